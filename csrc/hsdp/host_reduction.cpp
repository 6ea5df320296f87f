#include "hsdp/host_reduction.h"

#include <chrono>
#include <memory>
#include <utility>

#include "hsdp/background.h"
#include "kernels/batched_copy.h"

namespace hsdp_ckpt::hsdp {
namespace {

// Every term is multiplied before it is added to others, as torch does: it shows where the product
// is too small for a float16.
void Scale(GradBucket& bucket, int64_t rank, double scale) {
  if (scale == 1.0) return;
  for (at::Tensor& grad : bucket.grads) grad = grad.mul(scale);  // others may have it too
  for (const at::Tensor& piece : bucket.inbox) {
    if (piece.defined()) piece.mul_(scale);
  }
  bucket.input.narrow(0, rank * bucket.packed_stride(), bucket.packed_stride()).mul_(scale);
}

// output = the sum over the ranks, whose pieces are in the inbox; this rank's are taken from where
// they are. Frees the gradients.
void SumPieces(GradBucket& bucket, int64_t rank) {
  const ShardLayout& layout = bucket.layout;
  const auto first_peer = static_cast<size_t>(rank == 0 ? 1 : 0);
  // In place of a peer's pieces where the dtype allows it: what is summed is in the cache then.
  bucket.output = bucket.wire == bucket.reduced
                      ? bucket.inbox[first_peer]
                      : at::empty({bucket.stride}, bucket.ones.options().dtype(bucket.reduced));
  std::vector<kernels::SumSegment> segments;
  const auto add = [&](int64_t offset, int64_t numel, const void* own) {
    kernels::SumSegment segment{{}, At(bucket.output, offset), numel};
    for (int64_t r = 0; r < layout.shards(); ++r) {
      segment.srcs.push_back(r == rank ? own : At(bucket.inbox[static_cast<size_t>(r)], offset));
    }
    segments.push_back(std::move(segment));
  };
  for (size_t p = 0; p < bucket.in_place; ++p) {
    const int64_t numel = layout.shard_numel(p, rank);
    const bool is_last = p + 1 == bucket.params.size();
    const int64_t end = is_last ? layout.flat_numel() : layout.offset(p + 1);
    const int64_t first = layout.first_row(p, rank) * layout.param(p).row_size;
    add(layout.offset(p), numel, At(bucket.grads[p], first));
    // Padding goes to the other replicas: zeros, so that nothing uninitialised ever leaves the
    // process.
    const int64_t gap = layout.offset(p) + numel;
    if (gap < end) segments.push_back({{}, At(bucket.output, gap), end - gap});
  }
  add(bucket.packed_begin, bucket.packed_stride(), At(bucket.input, rank * bucket.packed_stride()));
  kernels::BatchedSum(segments, bucket.wire, bucket.reduced);
  bucket.grads.clear();
  bucket.input.reset();
  bucket.inbox.clear();
}

/// What is left of one reduction once its messages are posted: two tasks, one for each background
/// thread. The tasks own it, so that it outlives a reducer which is let go meanwhile.
class BackgroundReduction : public std::enable_shared_from_this<BackgroundReduction> {
 public:
  BackgroundReduction(std::shared_ptr<const UnitGrads> grads, const JointOp& op, bool all_reduce)
      : grads_(std::move(grads)), op_(op), all_reduce_(all_reduce) {}

  std::future<void> Run() {
    std::future<void> done = done_.get_future();
    RunInBackground(Background::kShards, [self = shared_from_this()] {
      self->Guarded(&BackgroundReduction::SumShards);
    });
    return done;
  }

 private:
  void Guarded(void (BackgroundReduction::*task)()) {
    try {
      (this->*task)();
    } catch (...) {
      done_.set_exception(std::current_exception());
    }
  }

  void SumShards() {
    for (const auto& bucket : grads_->buckets) {
      TakeShards(*bucket);
      AddPartial(*bucket);
      if (all_reduce_) StartAllReduce(*bucket);
    }
    if (!all_reduce_) return done_.set_value();
    RunInBackground(Background::kReplicas, [self = shared_from_this()] {
      self->Guarded(&BackgroundReduction::AwaitReplicas);
    });
  }

  void TakeShards(GradBucket& bucket) const {
    const Collectives& collectives = *grads_->collectives;
    if (collectives.shards() == 1) {
      bucket.output = std::exchange(bucket.input, {});
      return;
    }
    AwaitWorks(*grads_, bucket, "reduce-scatter");
    Scale(bucket, collectives.shard_rank(), collectives.pre_scale(bucket.reduced));
    SumPieces(bucket, collectives.shard_rank());
  }

  void StartAllReduce(GradBucket& bucket) const {
    const Collectives& collectives = *grads_->collectives;
    if (collectives.replicas() == 2) {
      bucket.other = at::empty_like(bucket.output);
      bucket.works = collectives.SwapReplicas(op_, bucket.output, bucket.other);
    } else {
      bucket.works = collectives.AllReduce(bucket.output, /*average=*/false);
    }
  }

  void AwaitReplicas() {
    for (const auto& bucket : grads_->buckets)
      AwaitWorks(*grads_, *bucket, "all-reduce over the replicas");
    done_.set_value();
  }

  const std::shared_ptr<const UnitGrads> grads_;
  const JointOp op_;
  const bool all_reduce_;
  std::promise<void> done_;
};

}  // namespace

void HostReduction::Allocate() {
  const Collectives& collectives = *grads().collectives;
  if (collectives.shards() == 1) return;
  for (const auto& bucket : grads().buckets) {
    const auto options = bucket->ones.options().dtype(bucket->wire);
    bucket->inbox.assign(static_cast<size_t>(collectives.shards()), at::Tensor());
    for (int64_t r = 0; r < collectives.shards(); ++r) {
      if (r == collectives.shard_rank()) continue;
      bucket->inbox[static_cast<size_t>(r)] = at::empty({bucket->stride}, options);
    }
  }
}

void HostReduction::Begin() {
  const JointOp op = grads().collectives->BeginReduction();
  if (grads().collectives->shards() > 1) {
    for (const auto& bucket : grads().buckets) PostPieces(op, *bucket);
  }
  stage_ = Stage::kAllReduce;
  const bool all_reduce = options_.all_reduce && grads().collectives->replicas() > 1;
  done_ = std::make_shared<BackgroundReduction>(grads_, op, all_reduce)->Run();
}

void HostReduction::PostPieces(const JointOp& op, GradBucket& bucket) const {
  const Collectives& collectives = *grads().collectives;
  std::vector<std::vector<at::Tensor>> pieces(static_cast<size_t>(collectives.shards()));
  for (int64_t r = 0; r < collectives.shards(); ++r) {
    if (r == collectives.shard_rank()) continue;
    const at::Tensor& from_peer = bucket.inbox[static_cast<size_t>(r)];
    pieces[static_cast<size_t>(r)] = Pieces(bucket, from_peer, collectives.shard_rank());
  }
  bucket.works = collectives.ExchangePieces(op, Runs(bucket), pieces);
}

void HostReduction::MoveOn(bool wait) {
  if (stage_ != Stage::kAllReduce) return;
  const bool is_over = wait || done_.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
  if (!is_over) return;
  done_.get();
  stage_ = Stage::kDone;
}

}  // namespace hsdp_ckpt::hsdp
