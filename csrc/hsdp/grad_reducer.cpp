#include "hsdp/grad_reducer.h"

#include <algorithm>
#include <map>
#include <utility>

#include "hsdp/hook_reduction.h"
#include "hsdp/host_reduction.h"
#include "hsdp/stream_reduction.h"
#include "kernels/batched_copy.h"

namespace hsdp_ckpt::hsdp {
namespace {

using Stage = Reduction::Stage;
using Side = DeviceStreams::Side;

std::unique_ptr<Reduction> MakeReduction(std::shared_ptr<const UnitGrads> grads, CommHook hook) {
  if (hook) return std::make_unique<HookReduction>(std::move(grads), std::move(hook));
  const bool reduces = !grads->buckets.empty();  // if not, its groups may be gone
  if (reduces && grads->collectives->exchanges_reductions(grads->device.type())) {
    return std::make_unique<HostReduction>(std::move(grads));
  }
  return std::make_unique<StreamReduction>(std::move(grads));
}

bool IsFreed(const at::Tensor& shard) {
  return shard.storage().nbytes() > 0 && shard.storage().data() == nullptr;
}

}  // namespace

/// The parameters of one bucket that are written in one fused pass.
struct GradReducer::WritePass {
  at::ScalarType sharded;
  bool accumulate;
  std::vector<kernels::CopySegment> copies;
  std::vector<kernels::SumSegment> sums;  // instead, where the other replica's output is added
};

GradReducer::GradReducer(std::string unit, std::vector<GradSpec> specs, at::Device device,
                         std::shared_ptr<Collectives> collectives,
                         std::shared_ptr<DeviceStreams> streams, CommHook comm_hook,
                         std::optional<at::TensorOptions> host)
    : specs_(std::move(specs)),
      grads_(std::make_shared<UnitGrads>(
          UnitGrads{std::move(unit), device, collectives, std::move(streams),
                    MakeBuckets(specs_, *collectives, device,
                                comm_hook ? SentBy::kHook : SenderOf(*collectives, device))})),
      reduction_(MakeReduction(grads_, std::move(comm_hook))),
      host_(host),
      used_here_(specs_.size(), false) {}

GradReducer::~GradReducer() {
  try {
    Join();
  } catch (const std::exception&) {
    // The device is gone, and what was held with it.
  }
}

void GradReducer::Start(std::vector<at::Tensor> grads, GradForm form,
                        const ReduceOptions& options) {
  TORCH_CHECK(reduction_->stage() == Stage::kIdle, "GradReducer: the last reduction of unit '",
              grads_->unit, "' has not been taken");
  TORCH_CHECK(grads.size() == specs_.size(), "GradReducer: ", grads.size(), " gradients for ",
              specs_.size(), " parameters");
  for (size_t i = 0; i < grads.size(); ++i) CheckGrad(i, form, grads[i]);
  for (size_t i = 0; i < grads.size(); ++i) {
    used_here_[i] = grads[i].defined();
    if (used_here_[i]) grads[i] = grads[i].detach().contiguous();
  }
  for (const auto& bucket : grads_->buckets) {
    Expect(*bucket, form);
    Pack(*bucket, grads);
  }
  reduction_->Allocate();
  grads.clear();  // the packed ones: allocated and last used on the compute stream
  reduction_->Start(options);
}

void GradReducer::CheckGrad(size_t i, GradForm form, const at::Tensor& grad) const {
  if (!grad.defined()) return;
  const at::ScalarType given = form == GradForm::kReduced ? specs_[i].reduced : specs_[i].computed;
  TORCH_CHECK(grad.layout() == at::kStrided, "a gradient of sizes ", grad.sizes(), " in unit '",
              grads_->unit,
              "' is sparse; sharded parameters need dense gradients (nn.Embedding(sparse=False))");
  TORCH_CHECK(grad.scalar_type() == given && grad.device() == grads_->device,
              "a gradient of sizes ", grad.sizes(), " in unit '", grads_->unit, "' is ",
              grad.scalar_type(), " on ", grad.device(), ", its parameter is ", specs_[i].computed,
              " on ", grads_->device);
}

bool GradReducer::KeepsSums() const {
  return !reduction_->options().all_reduce && grads_->collectives->replicas() > 1;
}

bool GradReducer::Keep() {
  if (reduction_->stage() != Stage::kDone || !KeepsSums()) return false;
  for (const auto& bucket : grads_->buckets) bucket->partial = std::exchange(bucket->output, {});
  reduction_->End();
  return true;
}

bool GradReducer::has_partial() const {
  if (reduction_->stage() != Stage::kIdle && KeepsSums()) return true;
  return std::any_of(grads_->buckets.begin(), grads_->buckets.end(),
                     [](const auto& bucket) { return bucket->partial.defined(); });
}

void GradReducer::DropPartial() {
  if (has_partial()) Join();
  for (const auto& bucket : grads_->buckets) bucket->partial.reset();
}

bool GradReducer::uses_all_here() const {
  return std::find(used_here_.begin(), used_here_.end(), false) == used_here_.end();
}

bool GradReducer::blocks_host() const {
  const bool asks_device =
      !uses_all_here() && !grads_->collectives->host_orders(grads_->device.type());
  return asks_device || reduction_->ends_with_backward();
}

std::vector<size_t> GradReducer::Unused() const {
  std::vector<size_t> unused;
  if (uses_all_here()) return unused;
  const auto scope = grads_->streams->Within(Side::kReduce);
  for (const auto& bucket : grads_->buckets) {
    at::Tensor used = bucket->FlagsOf(bucket->output).ne(0);
    if (bucket->other.defined()) used = used.logical_or(bucket->FlagsOf(bucket->other).ne(0));
    used = used.cpu();
    for (size_t p = 0; p < bucket->params.size(); ++p) {
      if (!used.const_data_ptr<bool>()[p]) unused.push_back(bucket->params[p]);
    }
  }
  return unused;
}

std::vector<at::Tensor> GradReducer::EmptyShards() const {
  std::vector<at::Tensor> tensors(specs_.size());
  for (const auto& bucket : grads_->buckets) {
    const int64_t rank = grads_->collectives->shard_rank();
    std::map<at::ScalarType, at::Tensor> buffers;
    for (size_t p = 0; p < bucket->params.size(); ++p) {
      const GradSpec& spec = specs_[bucket->params[p]];
      at::Tensor& buffer = buffers[spec.sharded];
      // As large as what is reduced, and laid out like it, see SwapIfPossible.
      if (!buffer.defined()) {
        const at::TensorOptions options = host_.value_or(bucket->ones.options());
        buffer = at::empty({bucket->stride}, options.dtype(spec.sharded));
      }
      const ShardLayout& layout = bucket->layout;
      const at::Tensor slice = buffer.narrow(0, layout.offset(p), layout.shard_numel(p, rank));
      tensors[bucket->params[p]] = slice.view(spec.cut.WithRows(layout.shard_rows(p, rank)));
    }
  }
  return tensors;
}

void GradReducer::FreeShards(const std::vector<at::Tensor>& shards) {
  if (host_) return;  // no forward has a use for it
  Join();             // a device may still write there
  for (const at::Tensor& shard : shards) {
    grads_->streams->Uses(shard);
    shard.storage().set_data_ptr_noswap(at::DataPtr(nullptr, grads_->device));
  }
}

void GradReducer::AllocateFreed(const GradBucket& bucket,
                                const std::vector<std::optional<at::Tensor>>& targets) {
  for (const size_t i : bucket.params) {
    const auto& target = targets[i];
    if (!target || !IsFreed(*target)) continue;
    const auto bytes = static_cast<int64_t>(target->storage().nbytes());
    const at::Tensor memory = at::empty({bytes}, target->options().dtype(at::kByte));
    target->storage().set_data_ptr_noswap(memory.storage().set_data_ptr({}));
  }
}

double GradReducer::PostScale(const GradBucket& bucket) const {
  if (bucket.is_average || reduction_->averages(bucket)) return 1.0;
  const Collectives& collectives = *grads_->collectives;
  const auto ranks = static_cast<double>(collectives.shards() * collectives.replicas());
  const double factor = reduction_->options().divide_factor.value_or(ranks);
  return 1.0 / (collectives.pre_scale(bucket.reduced) * factor);
}

// The pass that writes adds the replicas up and rounds once. In 16 bits the sum is rounded by
// itself, as an all-reduce in them has it.
void GradReducer::AddReplicas(GradBucket& bucket) const {
  const bool rounds = c10::elementSize(bucket.reduced) < sizeof(float);
  if (!bucket.other.defined() || !(rounds || reduction_->options().all_reduce_hook)) return;
  bucket.output.add_(std::exchange(bucket.other, {}));
}

// The pass that writes divides on the way. Averages that a hook is to see are made before, and
// those in float16, which may be too small for it: as torch rounds them.
void GradReducer::MakeAverages(GradBucket& bucket) {
  const auto& hook = reduction_->options().all_reduce_hook;
  const double scale = PostScale(bucket);
  const bool rounds = bucket.reduced == at::kHalf && scale != 1.0;
  if (!hook && !rounds) return;
  const auto scope = grads_->streams->Within(Side::kReduce);
  const at::Tensor averages = bucket.output.narrow(0, 0, bucket.layout.flat_numel());
  if (scale != 1.0) averages.mul_(scale);
  bucket.is_average = true;
  if (hook) hook(averages);
}

void GradReducer::Write(const std::vector<std::optional<at::Tensor>>& targets,
                        const std::vector<bool>& accumulate) {
  TORCH_CHECK(reduction_->stage() == Stage::kDone, "GradReducer: nothing has been reduced");
  TORCH_CHECK(targets.size() == specs_.size() && accumulate.size() == specs_.size(),
              "GradReducer: ", targets.size(), " targets for ", specs_.size(), " parameters");
  reduction_->RethrowOfUser();
  for (const auto& bucket : grads_->buckets) {
    AddReplicas(*bucket);
    MakeAverages(*bucket);
    if (host_) {
      WriteToHost(*bucket, targets, accumulate);
      continue;
    }
    if (SwapIfPossible(*bucket, targets, accumulate)) continue;
    AllocateFreed(*bucket, targets);
    RunPasses(*bucket, targets, accumulate);
  }
  has_written_ = true;
  End();
}

// The averages are as the gradients should be, in memory that nobody else needs. What the targets
// had goes back to the compute stream, which must have waited for the last averages there.
bool GradReducer::SwapIfPossible(GradBucket& bucket,
                                 const std::vector<std::optional<at::Tensor>>& targets,
                                 const std::vector<bool>& accumulate) const {
  if (bucket.other.defined() || PostScale(bucket) != 1.0) return false;
  const auto& first = targets[bucket.params[0]];
  if (!first || (has_written_ && !IsFreed(*first))) return false;
  const at::Storage& storage = first->storage();
  const auto item = static_cast<size_t>(c10::elementSize(bucket.reduced));
  if (storage.nbytes() != static_cast<size_t>(bucket.stride) * item) return false;
  for (size_t p = 0; p < bucket.params.size(); ++p) {
    const size_t i = bucket.params[p];
    const bool is_slice = targets[i] && !accumulate[i] &&
                          targets[i]->storage().is_alias_of(storage) &&
                          targets[i]->scalar_type() == bucket.reduced &&
                          targets[i]->storage_offset() == bucket.layout.offset(p);
    if (!is_slice) return false;
  }
  at::DataPtr averages = bucket.output.storage().set_data_ptr({});
  at::DataPtr old = storage.set_data_ptr(std::move(averages));
  bucket.output.storage().set_data_ptr_noswap(std::move(old));
  return true;
}

// By way of the device, whose passes they go through as ever.
void GradReducer::WriteToHost(const GradBucket& bucket,
                              const std::vector<std::optional<at::Tensor>>& targets,
                              const std::vector<bool>& accumulate) const {
  std::vector<std::optional<at::Tensor>> staged(targets.size());
  for (const size_t i : bucket.params) {
    if (!targets[i]) continue;
    const at::TensorOptions options = bucket.ones.options().dtype(targets[i]->dtype());
    staged[i] = at::empty(targets[i]->sizes(), options);
  }
  DeviceStreams& streams = *grads_->streams;
  {
    const auto scope = streams.Enter(Side::kReduce);
    for (const size_t i : bucket.params) {
      if (targets[i] && accumulate[i]) staged[i]->copy_(*targets[i], /*non_blocking=*/true);
    }
  }
  RunPasses(bucket, staged, accumulate);
  const auto scope = streams.Within(Side::kReduce);
  for (const size_t i : bucket.params) {
    if (targets[i]) targets[i]->copy_(*staged[i], /*non_blocking=*/true);
  }
}

void GradReducer::RunPasses(const GradBucket& bucket,
                            const std::vector<std::optional<at::Tensor>>& targets,
                            const std::vector<bool>& accumulate) const {
  const auto scope = grads_->streams->Enter(Side::kReduce);
  const double scale = PostScale(bucket);
  for (const WritePass& pass : PassesOf(bucket, targets, accumulate)) {
    kernels::BatchedSum(pass.sums, bucket.reduced, pass.sharded, scale, pass.accumulate);
    kernels::BatchedCopy(grads_->device, pass.copies, bucket.reduced, pass.sharded, scale,
                         pass.accumulate);
  }
  grads_->streams->Uses(bucket.output);
}

// One fused pass for each dtype of the targets, and for those that are added to.
std::vector<GradReducer::WritePass> GradReducer::PassesOf(
    const GradBucket& bucket, const std::vector<std::optional<at::Tensor>>& targets,
    const std::vector<bool>& accumulate) const {
  std::vector<WritePass> passes;
  const auto pass_of = [&](at::ScalarType sharded, bool adds) -> WritePass& {
    for (WritePass& pass : passes) {
      if (pass.sharded == sharded && pass.accumulate == adds) return pass;
    }
    return passes.emplace_back(WritePass{sharded, adds, {}, {}});
  };
  for (size_t p = 0; p < bucket.params.size(); ++p) {
    const size_t i = bucket.params[p];
    if (!targets[i].has_value()) continue;
    const at::Tensor& target = *targets[i];
    const int64_t offset = bucket.layout.offset(p);
    const int64_t numel = bucket.layout.shard_numel(p, grads_->collectives->shard_rank());
    CheckTarget(i, target, numel);
    grads_->streams->Uses(target);
    WritePass& pass = pass_of(specs_[i].sharded, accumulate[i]);
    if (numel == 0) continue;
    void* const to = target.mutable_data_ptr();
    if (bucket.other.defined()) {
      pass.sums.push_back({{At(bucket.output, offset), At(bucket.other, offset)}, to, numel});
    } else {
      pass.copies.push_back({At(bucket.output, offset), to, numel});
    }
  }
  return passes;
}

void GradReducer::CheckTarget(size_t i, const at::Tensor& target, int64_t numel) const {
  const at::ScalarType sharded = specs_[i].sharded;
  TORCH_CHECK(target.numel() == numel && target.scalar_type() == sharded && target.is_contiguous(),
              "GradReducer: the gradient of parameter ", i, " of unit '", grads_->unit, "' is ",
              target.scalar_type(), " ", target.sizes(), "; expected ", numel,
              " contiguous elements of ", sharded);
}

void GradReducer::Drop() {
  if (reduction_->stage() != Stage::kIdle) reduction_->Advance(/*wait=*/true);
  Join();
  End();
}

void GradReducer::End() {
  for (const auto& bucket : grads_->buckets) Clear(*bucket);
  reduction_->End();
}

void GradReducer::Join() {
  grads_->streams->Join(Side::kReduce);
  if (host_) grads_->streams->AwaitOnHost(Side::kReduce);
  ReleaseInputs();
  has_written_ = false;
}

}  // namespace hsdp_ckpt::hsdp
