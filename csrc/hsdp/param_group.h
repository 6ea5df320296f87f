#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "hsdp/collectives.h"
#include "hsdp/device_streams.h"
#include "hsdp/grad_reducer.h"
#include "hsdp/shard_layout.h"

namespace hsdp_ckpt {

/// The parameters of one unit: their shards, and their full form while the unit computes.
///
/// Memory: one flat buffer of bytes holds this rank's shards, laid out by ShardLayout (16-byte aligned); each shard is a
/// tensor with a storage of its own over a piece of it. The buffer is what the all-gather sends, as it is, whatever the
/// dtypes. The full parameters are tensors whose storages have no memory while the unit is sharded; unsharding lends them
/// pieces of one buffer. Their bytes are written past autograd, so version counters stand still and tensors saved for
/// backward stay valid across a reshard.
/// Ownership: buffers and the full parameters; never the module's own sharded Parameters, whose references torch's
/// `swap_tensors` counts.
/// Thread safety: one thread at a time (the caller's in forward, autograd's in backward).
class ParamGroup {
 public:
  enum class State { kSharded, kGathering, kUnsharded };

  ParamGroup(std::vector<std::vector<int64_t>> sizes, std::vector<at::ScalarType> dtypes, at::Device device,
             std::shared_ptr<Collectives> collectives);
  ~ParamGroup();
  ParamGroup(const ParamGroup&) = delete;
  ParamGroup& operator=(const ParamGroup&) = delete;

  /// Cuts this rank's rows out of `full` tensors (the parameters' sizes, any strides) into a new flat buffer.
  std::vector<at::Tensor> ShardFull(const std::vector<at::Tensor>& full);
  /// Copies `shards` (this rank's rows, the dtypes and the device given here) into a new flat buffer; the layout, and with
  /// it the unsharded tensors, follow. Returns the new shards; the old ones stay valid for whoever holds them.
  std::vector<at::Tensor> Rebind(const std::vector<at::Tensor>& shards, at::Device device);

  /// Full-size tensors without memory, for the caller to make Parameters of.
  std::vector<at::Tensor> EmptyFull() const;
  /// Those Parameters. From here on unsharding fills them; `on_grad` is called by autograd each time that parameter
  /// `trainable[i]`'s gradient is accumulated, without the GIL.
  void BindFull(std::vector<at::Tensor> full, std::vector<size_t> trainable, std::function<void(size_t)> on_grad);

  State state() const { return state_; }
  /// Starts the all-gather. No effect unless sharded.
  void StartGather();
  /// Makes the full parameters usable on the current stream; gathers first if nobody has. Blocks the host on the CPU only.
  void Unshard();
  /// Takes the full parameters' memory away, or drops a gather that was started. Never fails because of a peer.
  void Reshard();

  /// Takes what autograd has accumulated and starts the reduction. Parameters without a gradient contribute zeros.
  void StartReduce();
  /// Forgets what autograd has accumulated: after a backward that raised.
  void DropGrads();
  GradReducer& reducer() { return *reducer_; }
  const std::vector<size_t>& trainable() const { return trainable_; }

 private:
  void MakeLayout();
  std::vector<at::Tensor> ShardTensors() const;
  void Lend(uint8_t* base, const std::vector<int64_t>& offsets);

  std::vector<std::vector<int64_t>> sizes_;
  std::vector<at::ScalarType> dtypes_;
  at::Device device_;
  std::shared_ptr<Collectives> collectives_;
  std::shared_ptr<DeviceStreams> streams_;
  std::optional<ShardLayout> layout_;  // in bytes
  std::vector<int64_t> full_offsets_;  // in bytes, one past the end too
  std::vector<int64_t> shard_offsets_;

  at::Tensor flat_;    // bytes: this rank's shards
  at::Tensor packed_;  // bytes: everybody's shards by rank, while a gather is on its way
  at::Tensor lent_;    // bytes: what the full parameters' storages point into while unsharded
  WorkPtr gather_work_;
  std::unique_ptr<DeviceStreams::Mark> gather_mark_;
  State state_ = State::kSharded;

  std::vector<at::Tensor> full_;
  std::vector<size_t> trainable_;
  // Gradient accumulators live as long as somebody holds them: kept, so that their hooks are. A shared_ptr in torch 2.11,
  // an intrusive_ptr in 2.15.
  std::vector<decltype(torch::autograd::impl::grad_accumulator(std::declval<const at::Tensor&>()))> accumulators_;
  std::shared_ptr<std::function<void(size_t)>> on_grad_;
  std::unique_ptr<GradReducer> reducer_;
};

}  // namespace hsdp_ckpt
