#include "hsdp/collectives.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <tuple>
#include <utility>
#include <vector>

namespace hsdp_ckpt {
namespace {

using GroupPtr = c10::intrusive_ptr<c10d::ProcessGroup>;
using OpPtr = c10::intrusive_ptr<c10d::ReduceOp>;

constexpr int64_t kDefaultTimeout = -1;  // what the group was made with

// On a CUDA stream the backend orders the operation itself; only the CPU has somebody to wait for.
bool Async(const at::Tensor& tensor) { return tensor.is_cpu(); }

OpPtr Op(bool average) { return c10::make_intrusive<c10d::ReduceOp>(average ? c10d::ReduceOp::AVG : c10d::ReduceOp::SUM); }

}  // namespace

Collectives::Collectives(std::string shard_group, std::optional<std::string> replica_group)
    : gather_group_(shard_group), reduce_group_(std::move(shard_group)), replica_group_(std::move(replica_group)) {
  const GroupPtr group = c10d::resolve_process_group(gather_group_);
  shards_ = group->getSize();
  shard_rank_ = group->getRank();
  if (replica_group_) replicas_ = c10d::resolve_process_group(*replica_group_)->getSize();
}

void Collectives::SetReduceGroups(std::string shard_group, std::optional<std::string> replica_group) {
  TORCH_CHECK(c10d::resolve_process_group(shard_group)->getSize() == shards_ &&
                  replica_group.has_value() == replica_group_.has_value(),
              "Collectives: the groups for reductions are not of the same ranks");
  reduce_group_ = std::move(shard_group);
  replica_group_ = std::move(replica_group);
}

// The dispatcher's operators have one schema in torch 2.11 to 2.15; the methods of ProcessGroup were renamed in between.
WorkPtr Collectives::AllGather(at::Tensor output, at::Tensor input) const {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("c10d::_allgather_base_", "")
          .typed<std::tuple<at::Tensor, WorkPtr>(at::Tensor&, at::Tensor&, const GroupPtr&, bool, int64_t)>();
  return std::get<1>(op.call(output, input, c10d::resolve_process_group(gather_group_), Async(input), kDefaultTimeout));
}

WorkPtr Collectives::ReduceScatter(at::Tensor output, at::Tensor input) const {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("c10d::_reduce_scatter_base_", "")
          .typed<std::tuple<at::Tensor, WorkPtr>(at::Tensor&, at::Tensor&, const GroupPtr&, const OpPtr&, bool, int64_t)>();
  return std::get<1>(op.call(output, input, c10d::resolve_process_group(reduce_group_),
                             Op(Averages(input.device().type(), input.scalar_type())), Async(input), kDefaultTimeout));
}

WorkPtr Collectives::AllReduce(at::Tensor tensor) const {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("c10d::allreduce_", "")
          .typed<std::tuple<std::vector<at::Tensor>, WorkPtr>(at::TensorList, const GroupPtr&, const OpPtr&,
                                                              const std::optional<at::Tensor>&, bool, int64_t)>();
  const std::vector<at::Tensor> tensors{tensor};
  return std::get<1>(op.call(tensors, c10d::resolve_process_group(replica_group_.value()),
                             Op(Averages(tensor.device().type(), tensor.scalar_type())), std::nullopt, Async(tensor),
                             kDefaultTimeout));
}

bool Collectives::Averages(c10::DeviceType device, at::ScalarType dtype) const {
  if (shards_ * replicas_ == 1 || (dtype != at::kFloat && dtype != at::kBFloat16)) return false;
  return c10d::resolve_process_group(reduce_group_)->getBackend(device)->getBackendName() == "nccl";
}

double Collectives::PostScale(c10::DeviceType device, at::ScalarType dtype) const {
  return Averages(device, dtype) ? 1.0 : 1.0 / (PreScale(dtype) * static_cast<double>(shards_ * replicas_));
}

double Collectives::PreScale(at::ScalarType dtype) const {
  if (dtype != at::kHalf) return 1.0;
  const int64_t ranks = shards_ * replicas_;
  int64_t factor = 1;
  while (ranks % factor == 0 && ranks / factor > factor) factor *= 2;
  return 1.0 / static_cast<double>(factor);
}

}  // namespace hsdp_ckpt
