#include "hsdp/stream_reduction.h"

#include <algorithm>
#include <utility>

namespace hsdp_ckpt::hsdp {

using Stream = DeviceStreams::Stream;

void StreamReduction::Allocate() {
  if (grads().collectives->shards() == 1) return;
  const auto scope = grads().streams->Enter(Stream::kReduce);
  for (const auto& bucket : grads().buckets) {
    bucket->output = at::empty({bucket->stride}, bucket->input.options());
  }
}

bool StreamReduction::averages(const GradBucket& bucket) const {
  return !options_.divide_factor &&
         grads().collectives->averages(grads().device.type(), bucket.reduced);
}

void StreamReduction::Begin() {
  const auto scope = grads().streams->Enter(Stream::kReduce);
  const Collectives& collectives = *grads().collectives;
  for (const auto& bucket : grads().buckets) {
    if (collectives.shards() == 1) {
      bucket->output = bucket->input;
      continue;
    }
    const auto outputs = Pieces(*bucket, bucket->output, collectives.shard_rank());
    bucket->works = collectives.ReduceScatter(outputs, Runs(*bucket), averages(*bucket));
  }
  stage_ = Stage::kScatter;
  // On a stream the all-reduce queues up behind at once, so that its place there is the same on all
  // ranks. Where the host orders, the reduce-scatter is over only when peers have come, who may be
  // waiting for a gather that this rank has still to start.
  if (!collectives.host_orders(grads().device.type())) StartAllReduces();
}

void StreamReduction::StartAllReduces() {
  const auto scope = grads().streams->Enter(Stream::kReduce);
  for (const auto& bucket : grads().buckets) {
    AwaitWorks(grads(), *bucket, "reduce-scatter");
    if (on_cpu()) {
      bucket->grads.clear();
      bucket->input.reset();
    }
    AddPartial(*bucket);
  }
  // The inputs go before the all-reduces: replicas may be far away, and nobody should wait for them
  // to give memory back.
  if (grads().collectives->shards() > 1) HoldInputs();
  for (const auto& bucket : grads().buckets) AllReduce(*bucket);
  stage_ = Stage::kAllReduce;
}

void StreamReduction::AllReduce(GradBucket& bucket) {
  const Collectives& collectives = *grads().collectives;
  const bool is_last = options_.all_reduce || collectives.replicas() == 1;
  if (is_last && collectives.replicas() > 1) {
    bucket.works = collectives.AllReduce(bucket.output, averages(bucket));
  }
  if (on_cpu()) return;
  AwaitWorks(grads(), bucket, "all-reduce");
  // An all-reduce leaves the same bits on all ranks. A ring's reduce-scatter does not: it sums the
  // gradient of a parameter without dimensions for each rank in another order, beginning with its
  // neighbour's.
  const at::Tensor whole = bucket.WholeOf(bucket.output);
  if (!is_last || whole.numel() == 0 || collectives.shards() == 1) return;
  bucket.works = collectives.BroadcastFirst(whole);
  AwaitWorks(grads(), bucket, "broadcast");
}

void StreamReduction::MoveOn(bool wait) {
  if (stage_ == Stage::kScatter) {
    if (!wait && !WorksAreOver()) return;
    TakeWorks();
    StartAllReduces();
  }
  if (stage_ == Stage::kAllReduce) {
    if (!wait && !WorksAreOver()) return;
    TakeWorks();
    stage_ = Stage::kDone;
  }
}

bool StreamReduction::WorksAreOver() const {
  return std::all_of(grads().buckets.begin(), grads().buckets.end(),
                     [](const auto& bucket) { return bucket->works.AreOver(); });
}

void StreamReduction::TakeWorks() {
  for (const auto& bucket : grads().buckets) {
    if (bucket->works.empty()) continue;
    const auto scope = grads().streams->Enter(Stream::kReduce);
    AwaitWorks(grads(), *bucket, "reduction");
  }
}

// What the compute stream has allocated and the reduce stream reads goes back in ReleaseInputs,
// when the one has waited for the other. Left to the allocator, it would go back when the host
// finds that both have passed: the host is a whole backward ahead, and all gradients of the model
// would be held at once.
void StreamReduction::HoldInputs() {
  if (on_cpu()) return;
  const size_t before = inputs_held_.size();
  for (const auto& bucket : grads().buckets) {
    inputs_held_.insert(inputs_held_.end(), bucket->grads.begin(), bucket->grads.end());
    if (bucket->input.defined()) inputs_held_.push_back(bucket->input);
    bucket->grads.clear();
    bucket->input.reset();
  }
  if (inputs_held_.size() > before) inputs_read_ = grads().streams->Record(Stream::kReduce);
}

void StreamReduction::ReleaseInputs() {
  grads().streams->Join(std::exchange(inputs_read_, nullptr).get());
  for (const at::Tensor& tensor : std::exchange(inputs_held_, {})) grads().streams->Uses(tensor);
}

}  // namespace hsdp_ckpt::hsdp
