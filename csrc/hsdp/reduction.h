#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "hsdp/collectives.h"
#include "hsdp/device_streams.h"
#include "hsdp/grad_bucket.h"

namespace hsdp_ckpt::hsdp {

/// What a user may change between steps.
struct ReduceOptions {
  bool all_reduce = true;  ///< false: the sums over the shards wait here for the next all-reduce
  std::optional<double> divide_factor;  ///< instead of the number of ranks
  bool force_sum = false;               ///< collectives add up only; it is divided by itself
  /// Gets every all-reduced buffer of averages (one dimension, the reduce dtype) and may change it,
  /// on the reduce stream.
  std::function<void(const at::Tensor&)> all_reduce_hook;
};

/// A user's own reduction of one bucket: `grad` are a unit's gradients, one chunk a shard one after
/// another, of which `shard` is to become this rank's, averaged over all ranks. Without `shard`
/// nothing is sharded, and `grad` becomes the averages.
using CommHook =
    std::function<void(const at::Tensor& grad, const std::optional<at::Tensor>& shard)>;

/// What the reductions of one unit work on.
struct UnitGrads {
  std::string unit;  ///< its name, for messages
  at::Device device;
  std::shared_ptr<Collectives> collectives;
  std::shared_ptr<DeviceStreams> streams;
  GradBuckets buckets;
};

/// Waits for the works of one of the buckets; `what` names the operation in an error.
void AwaitWorks(const UnitGrads& grads, GradBucket& bucket, const char* what);

/// The way of a unit's packed gradients over the wire: reduce-scatter over the shards, all-reduce
/// over the replicas. Who orders the two differs: a device's streams (StreamReduction), the host
/// (HostReduction), or both are a user's (HookReduction).
///
///   from        call      to                when
///   kIdle       Start     kScatter          the buckets are packed and Allocate has been called
///   kIdle       Start     kAllReduce        nobody has to start the all-reduce later
///   kScatter    Advance   kAllReduce        the reduce-scatter is over: the all-reduce is started
///   kAllReduce  Advance   kDone             that is over too: the sums are in the outputs
///   any         End       kIdle             the sums are taken, or nobody wants them
///   any         an error of Advance         kIdle, and the buckets are empty
///
/// Thread safety: one thread at a time.
class Reduction {
 public:
  enum class Stage { kIdle, kScatter, kAllReduce, kDone };

  explicit Reduction(std::shared_ptr<const UnitGrads> grads) : grads_(std::move(grads)) {}
  virtual ~Reduction() = default;
  Reduction(const Reduction&) = delete;
  Reduction& operator=(const Reduction&) = delete;

  Stage stage() const { return stage_; }
  const ReduceOptions& options() const { return options_; }

  /// Makes the memory that other ranks' gradients come to. What may run out of memory is over
  /// before the first message goes out: peers would pair up a second try's messages with it.
  virtual void Allocate() = 0;
  /// Sends. Whatever it throws is a DistBackendError: peers have been sent something.
  void Start(const ReduceOptions& options);
  /// Moves on as far as it can, or to the end if `wait`. True when done. Throws DistBackendError,
  /// naming unit and rank.
  bool Advance(bool wait);
  void End() { stage_ = Stage::kIdle; }

  /// Whether the collectives divide on the way, so that the sums of `bucket` are averages.
  virtual bool averages(const GradBucket& bucket) const = 0;
  /// Whether it is over only when it is waited for, which peers can bear at the end of a backward
  /// only.
  virtual bool ends_with_backward() const { return false; }
  /// Throws what code of a user's has raised on the way: there are no sums then.
  virtual void RethrowOfUser() {}
  /// The current stream waits until a device has read the inputs; their memory goes back to it.
  void ReleaseInputs() { grads().streams->Release(inputs_); }

 protected:
  virtual void Begin() = 0;
  /// Does what Advance says; that cleans up after an error.
  virtual void MoveOn(bool wait) = 0;

  const UnitGrads& grads() const { return *grads_; }

  const std::shared_ptr<const UnitGrads> grads_;
  ReduceOptions options_;       // of the reduction under way
  DeviceStreams::Held inputs_;  // what a side stream reads
  Stage stage_ = Stage::kIdle;
};

}  // namespace hsdp_ckpt::hsdp
