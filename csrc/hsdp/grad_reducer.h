#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "hsdp/grad_bucket.h"
#include "hsdp/reduction.h"

namespace hsdp_ckpt::hsdp {

/// Reduces the gradients of one unit's trainable parameters: packs them into buckets, gives those
/// to a Reduction, and in a last pass divides, casts and adds the results into the sharded
/// gradients.
///
/// Only a rank that lacks a gradient reads the flags in a bucket's output, so an ordinary step
/// needs no synchronisation with the device for them.
///
///   idle -> Start -> (Advance)* -> done -> Write, Keep or Drop -> idle
///
/// Thread safety: one thread at a time.
class GradReducer {
 public:
  /// `unit`: its name, for messages. `specs`: of its trainable parameters, in order. `comm_hook`:
  /// reduces instead of this package. `host`: the sharded gradients are there, in such memory.
  GradReducer(std::string unit, std::vector<GradSpec> specs, at::Device device,
              std::shared_ptr<Collectives> collectives, std::shared_ptr<DeviceStreams> streams,
              CommHook comm_hook = nullptr, std::optional<at::TensorOptions> host = {});
  ~GradReducer();
  GradReducer(const GradReducer&) = delete;
  GradReducer& operator=(const GradReducer&) = delete;

  /// Takes `grads` (full size, in the dtypes that `form` says; undefined where this rank has none,
  /// zeros are sent) and starts. Throws c10::Error for a sparse gradient or one of another dtype.
  void Start(std::vector<at::Tensor> grads, GradForm form, const ReduceOptions& options);
  /// Moves on as far as it can, or to the end if `wait`. True when done. Throws DistBackendError,
  /// naming unit and rank.
  bool Advance(bool wait) { return reduction_->Advance(wait); }
  /// True while the all-reduce has yet to be started, which must not happen before an older one's.
  bool scattering() const { return reduction_->stage() == Reduction::Stage::kScatter; }

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
  /// Whether taking the result makes the host wait for the peers: for the hook's collectives, or
  /// in Unused for a device.
  bool blocks_host() const;
  /// Tensors for the sharded gradients: this rank's rows of every parameter, uninitialised, slices
  /// of one buffer for each bucket and dtype.
  std::vector<at::Tensor> EmptyShards() const;
  /// Takes the memory of what EmptyShards has made away, until it is written again.
  void FreeShards(const std::vector<at::Tensor>& shards);
  /// targets[i] = (accumulate[i] ? targets[i] : 0) + average, for contiguous targets of this rank's
  /// rows; absent targets are left out. Ends the reduction. What EmptyShards has made is not
  /// written where it needn't be: its storage takes over the memory of the averages.
  void Write(const std::vector<std::optional<at::Tensor>>& targets,
             const std::vector<bool>& accumulate);
  /// Forgets a reduction whose result nobody wants, after it has ended on the wire.
  void Drop();
  /// The current stream waits until a device has read the gradients that it was given, whose memory
  /// goes back to it.
  void ReleaseInputs() { reduction_->ReleaseInputs(); }
  /// The current stream waits for all reductions of the device, too; the host does, where the
  /// sharded gradients are there.
  void Join();

 private:
  struct WritePass;

  /// Whether the sums of the reduction under way are for the next all-reduce.
  bool KeepsSums() const;
  void CheckGrad(size_t i, GradForm form, const at::Tensor& grad) const;
  void CheckTarget(size_t i, const at::Tensor& target, int64_t numel) const;
  double PostScale(const GradBucket& bucket) const;
  void MakeAverages(GradBucket& bucket);
  void End();
  static void AllocateFreed(const GradBucket& bucket,
                            const std::vector<std::optional<at::Tensor>>& targets);
  bool uses_all_here() const;
  void AddReplicas(GradBucket& bucket) const;
  bool SwapIfPossible(GradBucket& bucket, const std::vector<std::optional<at::Tensor>>& targets,
                      const std::vector<bool>& accumulate) const;
  void WriteToHost(const GradBucket& bucket, const std::vector<std::optional<at::Tensor>>& targets,
                   const std::vector<bool>& accumulate) const;
  void RunPasses(const GradBucket& bucket, const std::vector<std::optional<at::Tensor>>& targets,
                 const std::vector<bool>& accumulate) const;
  std::vector<WritePass> PassesOf(const GradBucket& bucket,
                                  const std::vector<std::optional<at::Tensor>>& targets,
                                  const std::vector<bool>& accumulate) const;

  const std::vector<GradSpec> specs_;
  const std::shared_ptr<const UnitGrads> grads_;
  const std::unique_ptr<Reduction> reduction_;
  const std::optional<at::TensorOptions> host_;
  std::vector<bool> used_here_;  // by parameter: this rank has a gradient
  bool has_written_ = false;     // what the current stream has not waited for yet
};

}  // namespace hsdp_ckpt::hsdp
