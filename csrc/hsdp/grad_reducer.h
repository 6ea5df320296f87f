#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "hsdp/collectives.h"
#include "hsdp/device_streams.h"
#include "hsdp/shard_layout.h"

namespace hsdp_ckpt::hsdp {

/// How one parameter's gradient travels: as autograd leaves it, as it is summed, as the sharded
/// gradient has it.
struct GradDtypes {
  at::ScalarType computed, reduced, sharded;
};

/// What a user may change between steps.
struct ReduceOptions {
  bool all_reduce = true;  ///< false: the sums over the shards wait here for the next all-reduce
  std::optional<double> divide_factor;  ///< instead of the number of ranks
  /// Gets every all-reduced buffer of averages (one dimension, the reduce dtype) and may change it,
  /// on the reduce stream.
  std::function<void(const at::Tensor&)> all_reduce_hook;
};

/// Reduces the gradients of one unit's trainable parameters: reduce-scatter over the shards,
/// all-reduce over the replicas, and a last pass that divides, casts and adds into the sharded
/// gradients.
///
/// Large gradients are reduced from where autograd has left them, small ones through one packed
/// buffer for each dtype. Where the backend exchanges pieces point to point, ranks swap the
/// gradients as they are (bfloat16 for bfloat16 parameters) and each sums what it gets in the order
/// of the ranks, in float32: the same bits in every run, and on every replica. Behind the shards
/// stands one flag per parameter, 1 where this rank has a gradient: after the reduction the flag
/// says whether anybody had one. Only a rank that lacks a gradient reads it, so an ordinary step
/// needs no synchronisation with the device for it. States: idle -> Start -> (Advance)* -> done ->
/// Write, Keep or Drop -> idle. One thread at a time.
class GradReducer {
 public:
  /// `unit`: its name, for messages.
  GradReducer(std::string unit, std::vector<std::vector<int64_t>> sizes,
              std::vector<GradDtypes> dtypes, at::Device device,
              std::shared_ptr<Collectives> collectives, std::shared_ptr<DeviceStreams> streams);
  ~GradReducer();

  /// Takes `grads` (full size, the computed dtype; undefined where this rank has none, zeros are
  /// sent) and starts. Throws c10::Error for a sparse gradient or one of another dtype.
  void Start(std::vector<at::Tensor> grads, const ReduceOptions& options);
  /// Moves on as far as it can, or to the end if `wait`. True when done. Throws DistBackendError,
  /// naming unit and rank.
  bool Advance(bool wait);
  /// True while the all-reduce has yet to be started, which must not happen before an older one's.
  bool scattering() const { return stage_ == Stage::kScatter; }

  /// After a reduction without an all-reduce: keeps the sums for the next one and returns true;
  /// there is nothing to write.
  bool Keep();
  /// Whether sums over the shards wait for an all-reduce, or will when the reduction under way is
  /// over.
  bool has_partial() const;
  /// Forgets these sums.
  void DropPartial();
  /// Indices of parameters that no rank had a gradient for. Empty without looking if this rank had
  /// them all.
  std::vector<size_t> Unused() const;
  /// Tensors for the sharded gradients: this rank's rows of every parameter, uninitialised, slices
  /// of one buffer a dtype.
  std::vector<at::Tensor> EmptyShards() const;
  /// targets[i] = (accumulate[i] ? targets[i] : 0) + average, for contiguous targets of this rank's
  /// rows; absent targets are left out. Ends the reduction.
  void Write(const std::vector<std::optional<at::Tensor>>& targets,
             const std::vector<bool>& accumulate);
  /// Forgets a reduction whose result nobody wants, after it has ended on the wire.
  void Drop();
  /// The current stream waits until a device has read the gradients that it was given, whose memory
  /// goes back to it.
  void ReleaseInputs();
  /// The current stream waits for all that has been written, too.
  void Join();

 private:
  enum class Stage { kIdle, kScatter, kReduce, kDone };
  struct Bucket;

  void Pack(Bucket& bucket, const std::vector<at::Tensor>& grads) const;
  void Receive(Bucket& bucket) const;
  void StartExchange();
  void StartScatter();
  void StartAllReduce();
  void CallHook(Bucket& bucket);
  void HoldInputs();
  double PostScale(const Bucket& bucket) const;

  const std::string unit_;
  std::vector<std::vector<int64_t>> sizes_;
  std::vector<GradDtypes> dtypes_;
  at::Device device_;
  std::shared_ptr<Collectives> collectives_;
  std::shared_ptr<DeviceStreams> streams_;
  bool exchanges_;
  std::vector<std::shared_ptr<Bucket>> buckets_;
  ReduceOptions options_;  // of the reduction under way
  std::vector<bool> used_here_;
  Stage stage_ = Stage::kIdle;
  std::future<void> exchanged_;  // where pieces are exchanged: the end of it all
  std::unique_ptr<DeviceStreams::Mark> read_, written_;
  std::vector<at::Tensor> held_;  // until read_ has passed
};

}  // namespace hsdp_ckpt::hsdp
