#include "hsdp/stream_reduction.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace hsdp_ckpt::hsdp {

using Side = DeviceStreams::Side;

void StreamReduction::Allocate() {
  if (grads().collectives->shards() == 1) return;
  for (const auto& bucket : grads().buckets) {
    bucket->output = bucket->comm->Empty(bucket->stride, bucket->input.options());
  }
}

bool StreamReduction::averages(const GradBucket& bucket) const {
  return !options_.divide_factor && !options_.force_sum &&
         grads().collectives->averages(grads().device.type(), bucket.reduced);
}

bool StreamReduction::ends_with_backward() const {
  const Collectives& collectives = *grads().collectives;
  return collectives.reduce_comm().run && collectives.shards() > 1 &&
         collectives.host_orders(grads().device.type());
}

void StreamReduction::Begin() {
  stage_ = Stage::kScatter;
  has_sent_ = !ends_with_backward();
  if (has_sent_) Scatter();
}

void StreamReduction::Scatter() {
  const auto scope = grads().streams->Enter(Side::kReduce);
  const Collectives& collectives = *grads().collectives;
  for (const auto& bucket : grads().buckets) {
    if (collectives.shards() == 1) {
      bucket->output = bucket->input;
      continue;
    }
    const auto outputs = Pieces(*bucket, bucket->output, collectives.shard_rank());
    bucket->works = collectives.ReduceScatter(outputs, Runs(*bucket), averages(*bucket));
  }
  // On a stream the all-reduce queues up behind at once, so that its place there is the same on all
  // ranks. Where the host orders, the reduce-scatter is over only when peers have come, who may be
  // waiting for a gather that this rank has still to start.
  if (!collectives.host_orders(grads().device.type())) StartAllReduces();
}

void StreamReduction::StartAllReduces() {
  DeviceStreams& streams = *grads().streams;
  const auto scope = streams.Within(Side::kReduce);
  std::vector<at::Tensor> read;
  std::vector<WorkPtr> works;
  for (const auto& bucket : grads().buckets) {
    bucket->works.MoveQueuedTo(works);
    AwaitWorks(grads(), *bucket, "reduce-scatter");
    if (bucket->partial.defined()) {
      // What reads it comes behind the works.
      for (const WorkPtr& work : std::exchange(works, {})) work->wait();
      read.push_back(AddPartial(*bucket));
    }
    std::move(bucket->grads.begin(), bucket->grads.end(), std::back_inserter(read));
    bucket->grads.clear();
    // With one shard the input is the output.
    if (grads().collectives->shards() > 1) read.push_back(bucket->input);
    bucket->input.reset();
  }
  // The inputs go before the all-reduces: replicas may be far away, and nobody should wait for them
  // to give memory back. Left to the allocator, with `Uses`, they would go when the host finds that
  // the reduce stream has passed: the host is a whole backward ahead, and all gradients of the
  // model would be held at once.
  streams.Hold(Side::kReduce, std::move(read), inputs_, std::move(works));
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
  bucket.works.ForgetQueued();
  AwaitWorks(grads(), bucket, "all-reduce");
  // An all-reduce leaves the same bits on all ranks. A ring's reduce-scatter does not: it sums the
  // gradient of a parameter without dimensions for each rank in another order, beginning with its
  // neighbour's.
  const at::Tensor whole = bucket.WholeOf(bucket.output);
  if (!is_last || whole.numel() == 0 || collectives.shards() == 1) return;
  bucket.works = collectives.BroadcastFirst(whole);
  bucket.works.ForgetQueued();
  AwaitWorks(grads(), bucket, "broadcast");
}

void StreamReduction::MoveOn(bool wait) {
  if (!has_sent_) {
    if (!wait) return;
    has_sent_ = true;
    Scatter();
  }
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
    const auto scope = grads().streams->Within(Side::kReduce);
    AwaitWorks(grads(), *bucket, "reduction");
  }
}

}  // namespace hsdp_ckpt::hsdp
