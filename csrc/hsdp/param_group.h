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
#include "hsdp/gather.h"
#include "hsdp/gather_plan.h"
#include "hsdp/grad_reducer.h"
#include "hsdp/shard_layout.h"

namespace hsdp_ckpt::hsdp {

/// What gradients are added up in that wait for a later backward to reduce them: as one of torch's
/// wrappers has it.
enum class GradAccumulation {
  kComputed,  ///< as autograd leaves them (FSDP1)
  kReduced,   ///< in the reduction's dtype, cast when a backward is over (FSDP2 before 2.15)
  kReducedByAutograd,  ///< likewise, but autograd casts each term of a sum; and a reduction without
                       ///< reduce_dtype is in the dtype of the shards (FSDP2 from 2.15 on)
};

/// Where a unit's shards and their gradients are: beside its computation, or on the host, where
/// that is on a device; pinned, or not.
enum class ShardMemory : uint8_t { kDevice, kHost, kPinned };

/// The dtypes that one unit reduces in; absent: as computed.
struct Precision {
  std::optional<at::ScalarType> reduce_dtype;  ///< of the sums over the ranks
  bool keep_low_precision_grads =
      false;  ///< the sharded gradients have the full parameters' dtype, not the shards'
  GradAccumulation accumulation = GradAccumulation::kComputed;
};

/// One parameter as its unit stores it. Where other mesh dimensions than the unit's cut it too
/// (tensor and expert parallelism), all sizes are those of this rank's part of it.
struct StoredParam {
  CutSizes cut;
  at::ScalarType dtype;                         ///< of the shards
  std::optional<at::ScalarType> param_dtype{};  ///< it computes in; absent: as stored
  /// Its gradient may come as a summand over those other dimensions, in the reduction's dtype.
  bool is_summed_elsewhere = false;
  bool is_dtensor = false;   ///< the full parameter is one, and its gradient
  bool is_extended = false;  ///< somebody else gathers it, see Extension
};

/// One full parameter. `leaf` is what autograd knows; `memory` is what the unit fills: the leaf
/// itself, or the local tensor of a leaf that is a DTensor. Undefined: somebody else fills it.
struct FullParam {
  at::Tensor leaf, memory;
};

/// Gathers the extended parameters of a unit beside all others: begins with that, makes them full,
/// frees them. On a device it begins on the gathers' stream.
struct Extension {
  std::function<void()> start, finish, free;
};

/// Gives the local tensor of the gradient of parameter `i`, a DTensor, placed as that is: whatever
/// sum over other mesh dimensions this takes. Collective over these.
using LocalGrad = std::function<at::Tensor(size_t i, const at::Tensor& grad)>;

/// The parameters of one unit: their shards, and their full form while the unit computes.
///
/// Memory: one flat buffer of bytes holds this rank's shards, laid out by ShardLayout (16-byte
/// aligned); each shard is a tensor with a storage of its own over a piece of it. The full
/// parameters are tensors whose storages have no memory while the unit is sharded; unsharding lends
/// them pieces of one buffer. Their bytes are written past autograd, so version counters stand
/// still and tensors saved for backward stay valid across a reshard. A parameter without dimensions
/// is whole on every rank; all compute with the first one's value. Their copies stay equal to the
/// last bit: Gloo's ranks sum the gradients in one order, on CUDA the first one's sum goes to all
/// (see HostReduction and StreamReduction). Its GatherPlan says how a gather
/// moves bytes.
///
/// Ownership: buffers and the full parameters; never the module's own sharded Parameters, whose
/// references torch's `swap_tensors` counts. Thread safety: one thread at a time (the caller's in
/// forward, autograd's in backward).
class ParamGroup {
 public:
  enum class State { kSharded, kGathering, kUnsharded };

  ParamGroup(std::vector<StoredParam> params, Precision precision, at::Device device,
             std::shared_ptr<Collectives> collectives, LocalGrad local_grad = nullptr,
             Extension extension = {}, ShardMemory memory = ShardMemory::kDevice);
  ~ParamGroup();
  ParamGroup(const ParamGroup&) = delete;
  ParamGroup& operator=(const ParamGroup&) = delete;

  /// The wrapped module's name, for messages.
  const std::string& name() const { return name_; }
  void set_name(std::string name);
  int64_t shards() const { return collectives_->shards(); }
  /// From the next forward on ReshardAfterForward keeps shards among the ranks of `fewer`, a part
  /// of the shard group. Null: none.
  void SetReshardTo(std::shared_ptr<Collectives> fewer);
  /// Cuts this rank's rows out of `full` tensors (the parameters' sizes, any strides) into a new
  /// flat buffer.
  std::vector<at::Tensor> ShardFull(const std::vector<at::Tensor>& full);
  /// Copies `shards` (this rank's rows, the dtypes and the device given here) into a new flat
  /// buffer; the layout, and with it the unsharded tensors, follow. Returns the new shards; the old
  /// ones stay valid for whoever holds them.
  std::vector<at::Tensor> Rebind(const std::vector<at::Tensor>& shards, at::Device device);

  /// Full-size tensors without values, in the dtypes of the computation, for the caller to make
  /// Parameters of. BindFull takes their memory back.
  std::vector<at::Tensor> EmptyFull() const;
  /// Takes those Parameters. From here on unsharding fills them, and while they have no memory
  /// their use raises; `on_grad` is called by autograd each time that parameter `trainable[i]`'s
  /// gradient is accumulated, without the GIL. Gradients that wait for a reduction are taken over.
  /// Throws c10::Error while partial sums wait for an all-reduce, or where such a gradient's
  /// parameter is no longer trained.
  void BindFull(std::vector<FullParam> full, std::vector<size_t> trainable,
                std::function<void(size_t)> on_grad);

  at::Device device() const { return device_; }
  State state() const { return state_; }
  /// Starts the all-gather. No effect unless sharded.
  void StartGather();
  /// Makes the full parameters usable on the current stream; gathers first if nobody has. Blocks
  /// the host on the CPU only.
  void Unshard();
  /// Takes the full parameters' memory away, or drops a gather that was started.
  void Reshard();
  /// The same, but what SetReshardTo says of the full parameters stays: the next gather is of that,
  /// unless Reshard comes before.
  void ReshardAfterForward();
  bool is_resharded_to_fewer() const { return fewer_ && fewer_->flat.defined(); }
  /// Whether the shards are on the host, and the computation is not.
  bool is_offloaded() const { return memory_ != ShardMemory::kDevice && !device_.is_cpu(); }
  /// The host may change the shards when this returns: what a device was to read of them is read.
  void AwaitReads();
  /// Whether the full parameters have the same memory at every gather.
  bool keeps_memory() const { return keeps_memory_; }
  void SetKeepsMemory(bool keeps);
  /// Takes the memory of one parameter away, whose gradient is there, if it is large and nobody
  /// else uses it. Whoever needs it once more has to unshard again.
  void FreeTrained(size_t slot);
  /// Whether the memory of a full parameter is used under another name too: by a graph that has
  /// detached it, for instance, or by a user.
  bool has_views() const;

  /// A forward begins, whose backward's gradients wait for a later one's. All ranks call it, though
  /// one may leave out its backward.
  void ExpectKeptGrads();
  bool expects_kept_grads() const { return grad_form_ == GradForm::kReduced; }
  /// A backward begins, whose gradients are reduced when they are there, or wait for a later one's
  /// if they are to be `kept`.
  void ExpectGrads(bool kept);
  /// What a backward has left waits for a later one to reduce it.
  void KeepGrads();
  /// Takes what autograd has accumulated and starts its reduction. Parameters without a gradient
  /// contribute zeros.
  void StartReduce();
  /// Forgets what autograd has accumulated, after a backward that raised.
  void DropGrads();
  /// Forgets what backwards without a reduction, or without an all-reduce, have left for a later
  /// one.
  void DropKept();
  GradReducer& reducer() { return *reducer_; }
  /// From the next gather and the next reduction on these send them, see Collectives.
  void SetGatherComm(CustomComm comm);
  void SetReduceComm(CustomComm comm);
  /// From the next reduction on `hook` makes them.
  void SetCommHook(CommHook hook);
  ReduceOptions& reduce_options() { return reduce_options_; }
  const std::vector<size_t>& trainable() const { return trainable_; }
  /// Elements of the gradient of parameter `trainable()[slot]`.
  int64_t grad_numel(size_t slot) const { return grad_numels_[slot]; }
  /// So many elements are about half of the gradients. 0 where nothing comes halfway: on the CPU,
  /// and with a parameter that is larger than all others together, whose gradient may come first or
  /// last.
  int64_t half_of_grads() const { return half_of_grads_; }
  /// Whether a device's stream runs the gathers; if not, the host waits for them.
  bool gathers_on_stream() const { return !collectives_->host_orders(device_.type()); }

 private:
  void CheckNoPartial() const;
  void MakeLayout();
  std::vector<at::Tensor> ShardTensors() const;
  std::vector<GatheredParam> GatheredParams() const;
  void PlanFewer();
  at::TensorOptions ShardOptions() const;
  at::Tensor CutForFewer() const;
  at::ScalarType FullDtype(size_t i) const;
  at::ScalarType ReduceDtype(size_t i) const;
  at::ScalarType GradDtype(size_t i) const;
  std::vector<GradSpec> GradSpecs() const;
  void MoveGrads(std::vector<FullParam>& full, const std::vector<size_t>& trainable) const;
  int64_t HalfOfGrads() const;
  void WatchGrads(std::function<void(size_t)> on_grad);
  void MakeReducer();
  CutSizes GatheredCut(size_t i) const;
  void LendFull(size_t i);
  void TakeBackAll();

  std::string name_;
  std::string why_freed_;  // what a use of a full parameter without memory is told
  std::vector<StoredParam> params_;
  const Precision precision_;
  at::Device device_;
  std::shared_ptr<Collectives> collectives_;
  std::shared_ptr<DeviceStreams> streams_;
  const LocalGrad local_grad_;
  const Extension extension_;
  const ShardMemory memory_;

  Shards shards_;
  std::shared_ptr<Collectives> fewer_collectives_;
  std::optional<Shards> fewer_;  // what a forward has left, in the dtypes of the computation
  std::optional<Gather> gather_;
  bool keeps_memory_ = false;
  bool has_freed_some_ = false;  // of the full parameters, though the state is kUnsharded
  State state_ = State::kSharded;

  std::vector<FullParam> full_;
  std::vector<size_t> trainable_;
  std::vector<int64_t> grad_numels_;  // by trainable parameter
  int64_t half_of_grads_ = 0;
  // Gradient accumulators live as long as somebody holds them: they are kept, so that their hooks
  // are. Each is a shared_ptr in torch 2.11, an intrusive_ptr in 2.15.
  std::vector<decltype(torch::autograd::impl::grad_accumulator(std::declval<const at::Tensor&>()))>
      accumulators_;
  std::shared_ptr<std::function<void(size_t)>> on_grad_;
  GradForm grad_form_ = GradForm::kComputed;  // of the gradients that the next reduction takes
  ReduceOptions reduce_options_;
  CommHook comm_hook_;
  std::unique_ptr<GradReducer> reducer_;
};

}  // namespace hsdp_ckpt::hsdp
