#include "hsdp/hook_reduction.h"

#include <optional>
#include <utility>

namespace hsdp_ckpt::hsdp {

using Side = DeviceStreams::Side;

void HookReduction::Allocate() {
  for (const auto& bucket : grads().buckets) {
    bucket->output = at::empty({bucket->stride}, bucket->input.options());
  }
}

bool HookReduction::ends_with_backward() const {
  return grads().collectives->host_orders(grads().device.type());
}

void HookReduction::RethrowOfUser() {
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void HookReduction::Begin() {
  error_ = nullptr;
  stage_ = Stage::kScatter;
  if (!ends_with_backward()) Reduce();
}

void HookReduction::MoveOn(bool wait) {
  if (stage_ == Stage::kScatter && wait) Reduce();
}

void HookReduction::Reduce() {
  const auto scope = grads().streams->Enter(Side::kReduce);
  for (const auto& bucket : grads().buckets) {
    const int64_t numel = bucket->layout.flat_numel();
    const at::Tensor by_rank = bucket->input.view({grads().collectives->shards(), bucket->stride});
    SumFlags(*bucket, by_rank.narrow(1, numel, bucket->stride - numel).flatten());
    CallHook(*bucket, by_rank.narrow(1, 0, numel).flatten());  // of one shard: the input itself
    grads().streams->Hold(Side::kReduce, {std::exchange(bucket->input, {})}, inputs_, {});
  }
  stage_ = Stage::kDone;
}

void HookReduction::SumFlags(GradBucket& bucket, const at::Tensor& flags) const {
  const Collectives& collectives = *grads().collectives;
  const at::Tensor sums =
      bucket.output.narrow(0, bucket.layout.flat_numel(), flags.numel() / collectives.shards());
  if (collectives.shards() > 1) {
    bucket.works = collectives.ReduceScatter({sums}, {Cut{flags, {}}}, /*average=*/false);
  } else {
    sums.copy_(flags);
    if (collectives.replicas() > 1) bucket.works = collectives.AllReduce(sums, /*average=*/false);
  }
  AwaitWorks(grads(), bucket, "reduction of flags");
}

void HookReduction::CallHook(const GradBucket& bucket, const at::Tensor& grad) {
  const int64_t numel = bucket.layout.flat_numel();
  const bool is_sharded = grads().collectives->shards() > 1;
  std::optional<at::Tensor> shard;
  if (is_sharded) shard = at::empty({numel}, grad.options());
  try {
    hook_(grad, shard);
    // Either may have got other memory of another dtype.
    bucket.output.narrow(0, 0, numel).copy_(is_sharded ? *shard : grad);
  } catch (...) {
    // Peers may have reductions of other units before them: this one goes on to those.
    if (!error_) error_ = std::current_exception();
  }
}

}  // namespace hsdp_ckpt::hsdp
