#include "hsdp/collectives.h"

#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <tuple>
#include <utility>

#include "hsdp/c10d_ops.h"

namespace hsdp_ckpt::hsdp {
namespace {

using OpPtr = c10::intrusive_ptr<c10d::ReduceOp>;

constexpr int64_t kDefaultTimeout = -1;  // what the group was made with

// On a CUDA stream the backend orders the operation itself; only the CPU has somebody to wait for.
bool Async(const at::Tensor& tensor) { return tensor.is_cpu(); }

OpPtr Op(bool average) {
  return c10::make_intrusive<c10d::ReduceOp>(average ? c10d::ReduceOp::AVG : c10d::ReduceOp::SUM);
}

}  // namespace

Collectives::Collectives(std::string shard_group, std::optional<std::string> replica_group,
                         int64_t rank)
    : gather_group_(shard_group),
      reduce_group_(std::move(shard_group)),
      replica_group_(std::move(replica_group)),
      rank_(rank) {
  const GroupPtr group = c10d::resolve_process_group(gather_group_);
  shards_ = group->getSize();
  shard_rank_ = group->getRank();
  if (replica_group_) replicas_ = c10d::resolve_process_group(*replica_group_)->getSize();
}

void Collectives::SetReduceGroups(std::string shard_group,
                                  std::optional<std::string> replica_group) {
  TORCH_CHECK(c10d::resolve_process_group(shard_group)->getSize() == shards_ &&
                  replica_group.has_value() == replica_group_.has_value(),
              "Collectives: the groups for reductions are not of the same ranks");
  reduce_group_ = std::move(shard_group);
  replica_group_ = std::move(replica_group);
  const std::lock_guard lock(mutex_);
  traits_.clear();
}

Collectives::BackendTraits Collectives::TraitsOf(c10::DeviceType device) const {
  {
    const std::lock_guard lock(mutex_);
    if (const auto known = traits_.find(device); known != traits_.end()) return known->second;
  }
  const BackendTraits traits = AskBackend(device);
  const std::lock_guard lock(mutex_);
  return traits_.emplace(device, traits).first->second;
}

// No method of a backend tells who orders. "gloo" and "mpi" are the ones of torch's own that copy a
// device's tensors through the host; all others wait on streams. "nccl" and "nccl2" are those that
// run what is not asked for as `async` on the current stream; another one may have streams of its
// own.
Collectives::BackendTraits Collectives::AskBackend(c10::DeviceType device) const {
  const bool is_cpu = device == c10::kCPU;
  // One rank has nothing to order, and need not have a backend for its device.
  if (shards_ * replicas_ == 1 && !is_cpu) return {};
  const auto backend = c10d::resolve_process_group(reduce_group_)->getBackend(device);
  const std::string name = backend->getBackendName();
  return {.host_orders = is_cpu || name == "gloo" || name == "mpi",
          .exchanges = is_cpu && name == "gloo",
          .coalesces = backend->supportsCoalescing(),
          .runs_in_place = name == "nccl" || name == "nccl2"};
}

// On a device `wait` makes the current stream wait for the operation.
PendingWorks Collectives::Ordered(WorkPtr work, const GroupPtr& group,
                                  const at::Tensor& tensor) const {
  const BackendTraits traits = TraitsOf(tensor.device().type());
  if (traits.host_orders) return {std::move(work), group};
  if (traits.runs_in_place) return PendingWorks::OnStream(std::move(work));
  if (work) work->wait();
  return {};
}

// A backend that can't average says so before it sends anything, and so it does on all ranks. A
// rank that fails for reasons of its own must not do otherwise than its peers.
template <typename Issue>
WorkPtr Collectives::AverageIfItCan(Issue issue) const {
  try {
    return issue(/*average=*/true);
  } catch (const c10::DistBackendError&) {
    throw;
  } catch (const c10::OutOfMemoryError&) {
    throw;
  } catch (const c10::Error&) {
    refuses_average_ = true;
    return issue(/*average=*/false);
  }
}

PendingWorks Collectives::AllGather(const std::vector<at::Tensor>& own,
                                    const std::vector<Cut>& runs, at::ScalarType dtype) const {
  if (gather_comm_.run) {
    gather_comm_.run(runs.at(0).run.view(dtype), own.at(0).view(dtype), /*average=*/false);
    return {};
  }
  const GroupPtr group = c10d::resolve_process_group(gather_group_);
  if (exchanges_gathers(runs.at(0).run.device().type())) {
    PendingWorks works(departures_, departures_ ? departures_->Begin(Joint::kGather) : JointOp{});
    // Receives come first, as a message that finds its receiver waiting goes at once. Peers come in
    // turns, so that no rank is every other one's first.
    for (int64_t step = 1; step < shards_; ++step) {
      const int64_t peer = (shard_rank_ + shards_ - step) % shards_;
      for (const Cut& cut : runs) works.Receive(cut.piece(peer), group, peer);
    }
    for (int64_t step = 1; step < shards_; ++step) {
      const int64_t peer = (shard_rank_ + step) % shards_;
      for (const Cut& cut : runs) works.Send(cut.piece(shard_rank_), group, peer);
    }
    return works;
  }
  std::vector<at::Tensor> outputs, inputs = own;
  for (const Cut& cut : runs) outputs.push_back(cut.run);
  if (outputs.size() == 1) {
    static const auto op = FindOp<std::tuple<at::Tensor, WorkPtr>(
        at::Tensor&, at::Tensor&, const GroupPtr&, bool, int64_t)>("c10d::_allgather_base_");
    return Ordered(
        std::get<1>(op.call(outputs[0], inputs[0], group, Async(inputs[0]), kDefaultTimeout)),
        group, inputs[0]);
  }
  static const auto op =
      FindOp<WorkPtr(const at::TensorList, const at::TensorList, const GroupPtr&, bool)>(
          "c10d::allgather_into_tensor_coalesced_");
  return Ordered(op.call(outputs, inputs, group, Async(inputs[0])), group, inputs[0]);
}

PendingWorks Collectives::ReduceScatter(const std::vector<at::Tensor>& outputs,
                                        const std::vector<Cut>& runs, bool average) const {
  const GroupPtr group = c10d::resolve_process_group(reduce_group_);
  std::vector<at::Tensor> inputs;
  for (const Cut& cut : runs) inputs.push_back(cut.run);
  if (reduce_comm_.run) {
    reduce_comm_.run(outputs.at(0), inputs.at(0), average);
    return {};
  }
  if (inputs.size() == 1) {
    static const auto op = FindOp<std::tuple<at::Tensor, WorkPtr>(
        at::Tensor&, at::Tensor&, const GroupPtr&, const OpPtr&, bool, int64_t)>(
        "c10d::_reduce_scatter_base_");
    at::Tensor output = outputs.at(0);
    const auto issue = [&](bool averages) {
      return std::get<1>(
          op.call(output, inputs[0], group, Op(averages), Async(output), kDefaultTimeout));
    };
    return Ordered(average ? AverageIfItCan(issue) : issue(false), group, output);
  }
  static const auto op =
      FindOp<WorkPtr(const at::TensorList, const at::TensorList, const GroupPtr&, const OpPtr&,
                     bool, int64_t)>("c10d::reduce_scatter_tensor_coalesced_");
  const auto issue = [&](bool averages) {
    return op.call(outputs, inputs, group, Op(averages), Async(inputs[0]), kDefaultTimeout);
  };
  return Ordered(average ? AverageIfItCan(issue) : issue(false), group, inputs[0]);
}

JointOp Collectives::BeginReduction() const {
  return departures_ ? departures_->Begin(Joint::kReduction) : JointOp{};
}

PendingWorks Collectives::ExchangePieces(const JointOp& reduction, const std::vector<Cut>& runs,
                                         const std::vector<std::vector<at::Tensor>>& inbox) const {
  const GroupPtr group = c10d::resolve_process_group(reduce_group_);
  PendingWorks works(departures_, reduction);
  for (int64_t step = 1; step < shards_; ++step) {
    const int64_t peer = (shard_rank_ + shards_ - step) % shards_;
    for (const at::Tensor& piece : inbox.at(static_cast<size_t>(peer)))
      works.Receive(piece, group, peer);
  }
  for (int64_t step = 1; step < shards_; ++step) {
    const int64_t peer = (shard_rank_ + step) % shards_;
    for (const Cut& cut : runs) works.Send(cut.piece(peer), group, peer);
  }
  return works;
}

PendingWorks Collectives::SwapReplicas(const JointOp& reduction, const at::Tensor& output,
                                       const at::Tensor& inbox) const {
  const GroupPtr group = c10d::resolve_process_group(replica_group_.value());
  const int64_t peer = 1 - group->getRank();
  PendingWorks works(departures_, reduction);
  works.Receive(inbox, group, peer);
  works.Send(output, group, peer);
  return works;
}

PendingWorks Collectives::AllReduce(const at::Tensor& tensor, bool average) const {
  static const auto op = FindOp<std::tuple<std::vector<at::Tensor>, WorkPtr>(
      at::TensorList, const GroupPtr&, const OpPtr&, const std::optional<at::Tensor>&, bool,
      int64_t)>("c10d::allreduce_");
  const GroupPtr group = c10d::resolve_process_group(replica_group_.value());
  const std::vector<at::Tensor> tensors{tensor};
  const auto issue = [&](bool averages) {
    return std::get<1>(
        op.call(tensors, group, Op(averages), std::nullopt, Async(tensor), kDefaultTimeout));
  };
  // Behind a reduce-scatter the backend has been asked already: the sums are averages.
  return Ordered(average && shards_ == 1 ? AverageIfItCan(issue) : issue(average), group, tensor);
}

PendingWorks Collectives::BroadcastFirst(const at::Tensor& tensor) const {
  static const auto op = FindOp<std::tuple<std::vector<at::Tensor>, WorkPtr>(
      at::TensorList, const GroupPtr&, int64_t, int64_t, bool, int64_t)>("c10d::broadcast_");
  const GroupPtr group = c10d::resolve_process_group(reduce_group_);
  const std::vector<at::Tensor> tensors{tensor};
  return Ordered(std::get<1>(op.call(tensors, group, /*root_rank=*/0, /*root_tensor=*/0,
                                     Async(tensor), kDefaultTimeout)),
                 group, tensor);
}

bool Collectives::averages(c10::DeviceType device, at::ScalarType dtype) const {
  if (shards_ * replicas_ == 1 || (dtype != at::kFloat && dtype != at::kBFloat16)) return false;
  return (reduce_comm_.run || !host_orders(device)) && !refuses_average_;
}

double Collectives::pre_scale(at::ScalarType dtype) const {
  if (dtype != at::kHalf) return 1.0;
  const int64_t ranks = shards_ * replicas_;
  int64_t factor = 1;
  while (ranks % factor == 0 && ranks / factor > factor) factor *= 2;
  return 1.0 / static_cast<double>(factor);
}

void Await(PendingWorks& works, int64_t rank, const std::function<std::string()>& what) {
  const auto raise = [&](const char* cause) {
    TORCH_CHECK_WITH(DistBackendError, false, what(), " failed on rank ", rank, ": ", cause);
  };
  try {
    works.Wait();
  } catch (const c10::Error& error) {
    raise(error.what_without_backtrace());
  } catch (const std::exception& error) {
    raise(error.what());
  }
}

}  // namespace hsdp_ckpt::hsdp
