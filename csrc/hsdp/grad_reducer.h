#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "hsdp/collectives.h"
#include "hsdp/device_streams.h"
#include "hsdp/shard_layout.h"

namespace hsdp_ckpt {

/// Reduces the gradients of one unit's trainable parameters: pack, reduce-scatter over the shards, all-reduce over the
/// replicas, and a last pass that divides and adds into the sharded gradients.
///
/// Parameters of one dtype share a packed buffer. Behind each rank's shards stands one flag per parameter, 1 where this
/// rank has a gradient: after the reduction the flag says whether anybody had one. Only a rank that lacks a gradient reads
/// it, so an ordinary step needs no synchronisation with the device for it.
/// States: idle -> Start -> (Advance)* -> done -> Write or Drop -> idle. One thread at a time.
class GradReducer {
 public:
  GradReducer(std::vector<std::vector<int64_t>> sizes, std::vector<at::ScalarType> dtypes, at::Device device,
              std::shared_ptr<Collectives> collectives, std::shared_ptr<DeviceStreams> streams);

  /// Packs `grads` (full size, the parameter's dtype; undefined where this rank has none, zeros are sent) and starts the
  /// reduce-scatter. The gradients are freed. Throws c10::Error for a sparse gradient or one of another dtype.
  void Start(std::vector<at::Tensor> grads);
  /// Moves on as far as it can, or to the end if `wait`. True when done.
  bool Advance(bool wait);
  /// True from Start until the reduce-scatter is over: the all-reduce must not be started before an older one's.
  bool scattering() const { return stage_ == Stage::kScatter; }

  /// Indices of parameters that no rank had a gradient for. Empty without looking if this rank had them all.
  std::vector<size_t> Unused() const;
  /// Tensors for the sharded gradients: this rank's rows of every parameter, uninitialised, slices of one buffer a dtype.
  std::vector<at::Tensor> EmptyShards() const;
  /// targets[i] = (accumulate[i] ? targets[i] : 0) + average, for contiguous targets of this rank's rows; absent targets
  /// are left out. Ends the reduction.
  void Write(const std::vector<std::optional<at::Tensor>>& targets, const std::vector<bool>& accumulate);
  /// Forgets a reduction whose result nobody wants, after it has ended on the wire.
  void Drop();
  /// The current stream waits for all that has been written.
  void Join();

 private:
  enum class Stage { kIdle, kScatter, kReduce, kDone };
  struct Bucket {
    at::ScalarType dtype;
    std::vector<size_t> params;
    ShardLayout layout;
    int64_t stride;  // elements that one rank gets: shards, flags, padding
    at::Tensor ones;
    at::Tensor input, output;
    WorkPtr work;
  };

  void Pack(Bucket& bucket, const std::vector<at::Tensor>& grads);
  void StartAllReduce();

  std::vector<std::vector<int64_t>> sizes_;
  at::Device device_;
  std::shared_ptr<Collectives> collectives_;
  std::shared_ptr<DeviceStreams> streams_;
  std::vector<Bucket> buckets_;
  std::vector<bool> used_here_;
  Stage stage_ = Stage::kIdle;
  std::unique_ptr<DeviceStreams::Mark> written_;
};

}  // namespace hsdp_ckpt
