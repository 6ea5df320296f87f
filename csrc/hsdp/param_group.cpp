#include "hsdp/param_group.h"

#include <torch/csrc/autograd/utils/lambda_post_hook.h>

#include <algorithm>
#include <utility>

#include "hsdp/lent_memory.h"
#include "kernels/batched_copy.h"

namespace hsdp_ckpt::hsdp {
namespace {

uint8_t* Bytes(const at::Tensor& tensor) {
  return static_cast<uint8_t*>(tensor.mutable_data_ptr());
}

bool HasViews(const FullParam& full) {
  return full.memory.defined() && full.memory.storage().use_count() > 1;
}

}  // namespace

ParamGroup::ParamGroup(std::vector<StoredParam> params, Precision precision, at::Device device,
                       std::shared_ptr<Collectives> collectives, LocalGrad local_grad,
                       Extension extension, ShardMemory memory)
    : params_(std::move(params)),
      precision_(precision),
      device_(device),
      collectives_(std::move(collectives)),
      streams_(DeviceStreams::Of(device)),
      local_grad_(std::move(local_grad)),
      extension_(std::move(extension)),
      memory_(memory) {
  const auto check = [](const std::optional<at::ScalarType>& dtype) {
    TORCH_CHECK_VALUE(!dtype || kernels::Computes(*dtype), "mixed precision in ", *dtype,
                      " is not supported: pass float32, float64, bfloat16 or float16");
  };
  check(precision_.reduce_dtype);
  for (const StoredParam& param : params_) check(param.param_dtype);
  MakeLayout();
}

ParamGroup::~ParamGroup() {
  // The full parameters may outlive the group in somebody's hands; they must not point into its
  // memory then.
  TakeBackAll();
}

void ParamGroup::set_name(std::string name) {
  name_ = std::move(name);
  why_freed_ = c10::str(
      "rank ", collectives_->rank(), ": a full parameter of module ", name_,
      " is used while it has no memory. It has some while the module computes, and in backward "
      "from where that comes to a tensor which the module has returned or kept: return all tensors "
      "that losses and other modules use, in tuples, lists, dicts or objects with attributes. Or "
      "keep the parameters from forward to backward, with reshard_after_forward=False "
      "(fully_shard) or ShardingStrategy.SHARD_GRAD_OP. Or a backward has come between that of "
      "create_graph=True, or a transform of torch.func, and this one: give it retain_graph=True");
}

at::ScalarType ParamGroup::FullDtype(size_t i) const {
  const StoredParam& param = params_[i];
  return param.param_dtype && kernels::Computes(param.dtype) ? *param.param_dtype : param.dtype;
}

// Of an extended parameter there is nothing in the unit's buffers.
CutSizes ParamGroup::GatheredCut(size_t i) const {
  return params_[i].is_extended ? CutSizes{{0}, 0} : params_[i].cut;
}

std::vector<GatheredParam> ParamGroup::GatheredParams() const {
  std::vector<GatheredParam> params;
  for (size_t i = 0; i < params_.size(); ++i) {
    params.push_back({GatheredCut(i), params_[i].dtype, FullDtype(i)});
  }
  return params;
}

void ParamGroup::MakeLayout() {
  shards_ = PlanShards(collectives_, GatheredParams(), device_.type());
  shards_.is_full = shards_.is_full && !is_offloaded();
  gather_.emplace(device_, streams_);
  PlanFewer();
}

void ParamGroup::SetReshardTo(std::shared_ptr<Collectives> fewer) {
  fewer_collectives_ = std::move(fewer);
  if (state_ == State::kGathering) Reshard();  // it may be a gather of what is forgotten here
  PlanFewer();
}

void ParamGroup::PlanFewer() {
  fewer_.reset();
  if (!fewer_collectives_) return;
  std::vector<GatheredParam> params = GatheredParams();
  for (GatheredParam& param : params) param.stored = param.full;
  fewer_ = PlanShards(fewer_collectives_, params, device_.type());
}

// This rank's shards among fewer ranks, of the full parameters.
at::Tensor ParamGroup::CutForFewer() const {
  const ShardLayout& layout = *fewer_->layout;
  at::Tensor flat = at::zeros({layout.flat_numel()}, at::TensorOptions(at::kByte).device(device_));
  std::vector<kernels::CopySegment> segments;
  for (size_t i = 0; i < params_.size(); ++i) {
    ShardPlace place = layout.place(i, fewer_->rank());
    if (!params_[i].cut.is_cut()) place.first = 0;
    if (place.run == 0) continue;
    segments.push_back({Bytes(full_[i].memory) + place.first, Bytes(flat) + layout.offset(i),
                        place.run, place.runs, place.stride, place.run});
  }
  kernels::BatchedCopy(device_, segments, at::kByte, at::kByte);
  return flat;
}

std::vector<at::Tensor> ParamGroup::ShardTensors() const {
  std::vector<at::Tensor> shards;
  for (size_t i = 0; i < params_.size(); ++i) {
    const std::vector<int64_t> sizes =
        GatheredCut(i).WithRows(shards_.layout->shard_rows(i, shards_.rank()));
    shards.push_back(PieceOf(shards_.flat, ShardAddress(shards_, i), sizes, params_[i].dtype));
  }
  return shards;
}

std::vector<at::Tensor> ParamGroup::ShardFull(const std::vector<at::Tensor>& full) {
  TORCH_CHECK(full.size() == params_.size(), "ParamGroup: ", full.size(), " tensors for ",
              params_.size(), " parameters");
  std::vector<at::Tensor> own;
  for (size_t i = 0; i < full.size(); ++i) {
    const CutSizes cut = GatheredCut(i);
    TORCH_CHECK(
        full[i].sizes() == at::IntArrayRef(cut.sizes) && full[i].scalar_type() == params_[i].dtype,
        "ParamGroup: parameter ", i, " is ", full[i].sizes(), ", expected ",
        at::IntArrayRef(cut.sizes));
    const int64_t rank = collectives_->shard_rank();
    own.push_back(full[i].detach());
    if (cut.is_cut())
      own[i] = own[i].narrow(cut.dim, shards_.layout->first_row(i, rank),
                             shards_.layout->shard_rows(i, rank));
  }
  return Rebind(own, is_offloaded() ? at::Device(at::kCPU) : device_);
}

std::vector<at::Tensor> ParamGroup::Rebind(const std::vector<at::Tensor>& shards,
                                           at::Device device) {
  TORCH_CHECK(shards.size() == params_.size(), "ParamGroup: ", shards.size(), " shards for ",
              params_.size(), " parameters");
  CheckNoPartial();
  Reshard();
  const int64_t rank = collectives_->shard_rank();
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::vector<int64_t> expected =
        GatheredCut(i).WithRows(shards_.layout->shard_rows(i, rank));
    TORCH_CHECK(shards[i].sizes() == at::IntArrayRef(expected),
                "ParamGroup: the shard of parameter ", i, " is ", shards[i].sizes(), ", expected ",
                at::IntArrayRef(expected));
  }
  if (is_offloaded()) {
    TORCH_CHECK_VALUE(device.is_cpu(), "the parameters of module ", name_,
                      " are offloaded to the CPU, and were moved to ", device,
                      ": leave them there (the module computes on ", device_, ")");
    AwaitReads();
  } else {
    device_ = device;
  }
  streams_ = DeviceStreams::Of(device_);
  for (size_t i = 0; i < shards.size(); ++i) params_[i].dtype = shards[i].scalar_type();
  MakeLayout();
  // Padding is sent along by every gather: zeros, so that nothing uninitialised ever leaves the
  // process.
  shards_.flat = at::empty({shards_.layout->flat_numel()}, ShardOptions()).zero_();
  std::vector<at::Tensor> bound = ShardTensors();
  for (size_t i = 0; i < shards.size(); ++i) bound[i].copy_(shards[i].detach());
  return bound;
}

at::TensorOptions ParamGroup::ShardOptions() const {
  const at::TensorOptions bytes(at::kByte);
  if (!is_offloaded()) return bytes.device(device_);
  return bytes.device(at::kCPU).pinned_memory(memory_ == ShardMemory::kPinned);
}

void ParamGroup::AwaitReads() {
  if (is_offloaded()) streams_->AwaitOnHost(DeviceStreams::Side::kGather);
}

std::vector<at::Tensor> ParamGroup::EmptyFull() const {
  std::vector<at::Tensor> full;
  for (size_t i = 0; i < params_.size(); ++i) {
    full.push_back(
        at::empty(GatheredCut(i).sizes, at::TensorOptions(FullDtype(i)).device(device_)));
  }
  return full;
}

void ParamGroup::CheckNoPartial() const {
  TORCH_CHECK(
      !reducer_ || !reducer_->has_partial(), "unit ", name_,
      " holds gradients that are summed over its shards and not yet over the replicas: run a "
      "backward with set_requires_all_reduce(True) before its parameters' dtype, device or "
      "requires_grad change");
}

void ParamGroup::BindFull(std::vector<FullParam> full, std::vector<size_t> trainable,
                          std::function<void(size_t)> on_grad) {
  TORCH_CHECK(full.size() == params_.size(), "ParamGroup: ", full.size(), " tensors for ",
              params_.size(), " parameters");
  CheckNoPartial();
  for (const size_t i : trainable) {
    // Autograd casts to it, and takes no others for this parameter.
    if (GradDtype(i) != FullDtype(i)) full[i].leaf.set_grad_dtype(GradDtype(i));
  }
  MoveGrads(full, trainable);
  Reshard();
  full_ = std::move(full);
  // Not before: a profiler that notes shapes asks for the address of whatever an operator is given,
  // and Parameters are made by one.
  TakeBackAll();
  trainable_ = std::move(trainable);
  grad_numels_.clear();
  for (const size_t i : trainable_)
    grad_numels_.push_back(c10::multiply_integers(params_[i].cut.sizes));
  half_of_grads_ = HalfOfGrads();
  WatchGrads(std::move(on_grad));
  MakeReducer();
}

void ParamGroup::SetGatherComm(CustomComm comm) {
  Reshard();
  collectives_->SetGatherComm(std::move(comm));
  shards_.plan = PlanGather(GatheredParams(), *shards_.layout, *collectives_, device_.type());
}

void ParamGroup::SetReduceComm(CustomComm comm) {
  CheckNoPartial();
  reducer_.reset();  // its buckets have the memory of the one before
  collectives_->SetReduceComm(std::move(comm));
  MakeReducer();
}

void ParamGroup::SetCommHook(CommHook hook) {
  CheckNoPartial();
  comm_hook_ = std::move(hook);
  MakeReducer();
}

void ParamGroup::MakeReducer() {
  const std::optional<at::TensorOptions> host =
      is_offloaded() ? std::optional(ShardOptions()) : std::nullopt;
  reducer_ = std::make_unique<GradReducer>(name_, GradSpecs(), device_, collectives_, streams_,
                                           comm_hook_, host);
}

// What backwards without a reduction have left here is for a later one, with the parameters that
// are there then.
void ParamGroup::MoveGrads(std::vector<FullParam>& full,
                           const std::vector<size_t>& trainable) const {
  std::vector<at::Tensor> kept(full.size());
  for (const size_t i : trainable_) kept[i] = full_[i].leaf.grad();
  for (size_t i = 0; i < kept.size(); ++i) {
    const bool trained = std::find(trainable.begin(), trainable.end(), i) != trainable.end();
    TORCH_CHECK(trained || !kept[i].defined(), "parameter ", i, " of unit ", name_,
                " holds a gradient that has not been reduced: run a backward that reduces (outside "
                "of no_sync, with set_requires_gradient_sync(True)), or call the model's "
                "zero_grad(), before the parameter is frozen");
  }
  for (size_t i = 0; i < kept.size(); ++i) {
    if (!kept[i].defined()) continue;
    const bool reduced = grad_form_ == GradForm::kReduced;
    const at::ScalarType dtype = reduced ? ReduceDtype(i) : GradDtype(i);
    at::Tensor& leaf = full[i].leaf;
    leaf.mutable_grad() = kept[i].to(leaf.options().dtype(dtype));
  }
}

int64_t ParamGroup::HalfOfGrads() const {
  if (trainable_.empty() || !gathers_on_stream()) return 0;
  int64_t all = 0, largest = 0;
  for (size_t slot = 0; slot < trainable_.size(); ++slot) {
    all += grad_numel(slot);
    largest = std::max(largest, grad_numel(slot));
  }
  // Somewhat less than half: of two matrices with biases the first one's is enough.
  return largest > all - largest ? 0 : all / 2 - all / 16;
}

void ParamGroup::WatchGrads(std::function<void(size_t)> on_grad) {
  on_grad_ = std::make_shared<std::function<void(size_t)>>(std::move(on_grad));
  accumulators_.clear();
  for (size_t slot = 0; slot < trainable_.size(); ++slot) {
    auto accumulator = torch::autograd::impl::grad_accumulator(full_[trainable_[slot]].leaf);
    // The reference is weak, as a graph may outlive the group. The hook is C++, so that a
    // parameter's arrival costs no GIL.
    accumulator->add_post_hook(std::make_unique<torch::autograd::utils::LambdaPostHook>(
        [weak = std::weak_ptr<std::function<void(size_t)>>(on_grad_), slot](
            const torch::autograd::variable_list& outputs, const torch::autograd::variable_list&) {
          if (const auto call = weak.lock()) (*call)(slot);
          return outputs;
        }));
    accumulators_.push_back(std::move(accumulator));
  }
}

at::ScalarType ParamGroup::ReduceDtype(size_t i) const {
  const bool as_stored = precision_.accumulation == GradAccumulation::kReducedByAutograd;
  return precision_.reduce_dtype.value_or(as_stored ? params_[i].dtype : FullDtype(i));
}

// What autograd leaves. It casts down by itself where it casts at all; up only for a sum that goes
// on, see ExpectGrads: a gradient that is reduced at once is cast on its way.
at::ScalarType ParamGroup::GradDtype(size_t i) const {
  const bool casts = precision_.accumulation == GradAccumulation::kReducedByAutograd;
  const at::ScalarType full = FullDtype(i), reduced = ReduceDtype(i);
  const bool at_once =
      params_[i].is_summed_elsewhere || c10::elementSize(reduced) <= c10::elementSize(full);
  return casts && at_once ? reduced : full;
}

std::vector<GradSpec> ParamGroup::GradSpecs() const {
  std::vector<GradSpec> specs;
  for (const size_t i : trainable_) {
    const bool low = precision_.keep_low_precision_grads;
    specs.push_back({.cut = params_.at(i).cut,
                     .computed = GradDtype(i),
                     .reduced = ReduceDtype(i),
                     .sharded = low ? FullDtype(i) : params_.at(i).dtype});
  }
  return specs;
}

void ParamGroup::StartGather() {
  if (has_freed_some_) Reshard();  // somebody computes with the unit once more
  if (state_ != State::kSharded) return;
  gather_->Allocate(is_resharded_to_fewer() ? *fewer_ : shards_);
  state_ = State::kGathering;
  gather_->Send(extension_.start);
}

void ParamGroup::Unshard() {
  StartGather();
  if (state_ == State::kUnsharded) return;
  gather_->Join(name_);
  gather_->Unpack();
  if (fewer_) fewer_->flat.reset();
  for (size_t i = 0; i < full_.size(); ++i) LendFull(i);
  if (extension_.finish) extension_.finish();
  state_ = State::kUnsharded;
}

void ParamGroup::FreeTrained(size_t slot) {
  const size_t i = trainable_.at(slot);
  if (state_ != State::kUnsharded || keeps_memory_ || params_[i].is_extended) return;
  if (HasViews(full_[i]) || !gather_->IsFreedAlone(i)) return;
  TakeBack(full_[i].memory, why_freed_);
  gather_->FreeOne(i);
  has_freed_some_ = true;
}

// Without a gather this rank's shards are the full parameters.
void ParamGroup::LendFull(size_t i) {
  if (params_[i].is_extended) return;
  if (gather_->has_memory()) {
    const auto [buffer, offset] = gather_->PlaceOf(i);
    Lend(full_[i].memory, buffer, Bytes(buffer) + offset);
  } else if (shards_.is_full) {
    Lend(full_[i].memory, shards_.flat, ShardAddress(shards_, i));
  }
}

void ParamGroup::TakeBackAll() {
  for (const FullParam& full : full_) {
    if (full.memory.defined()) TakeBack(full.memory, why_freed_);
  }
}

void ParamGroup::Reshard() {
  if (state_ == State::kUnsharded) {
    TakeBackAll();
  } else if (state_ == State::kGathering) {
    // Peers count on the rows that this rank sends, and write into this buffer.
    gather_->Join(name_);
  }
  if (extension_.free && state_ != State::kSharded) extension_.free();
  state_ = State::kSharded;
  gather_->Free(keeps_memory_);
  has_freed_some_ = false;
  if (fewer_) fewer_->flat.reset();
}

void ParamGroup::SetKeepsMemory(bool keeps) {
  keeps_memory_ = keeps;
  if (!keeps && state_ == State::kSharded) gather_->Free(/*keep=*/false);
}

void ParamGroup::ReshardAfterForward() {
  const bool keeps = fewer_ && state_ == State::kUnsharded && gather_->has_memory();
  at::Tensor kept = keeps ? CutForFewer() : at::Tensor();
  Reshard();
  if (keeps) fewer_->flat = std::move(kept);
}

bool ParamGroup::has_views() const { return std::any_of(full_.begin(), full_.end(), HasViews); }

void ParamGroup::ExpectKeptGrads() {
  if (precision_.accumulation != GradAccumulation::kComputed) grad_form_ = GradForm::kReduced;
}

void ParamGroup::ExpectGrads(bool kept) {
  if (precision_.accumulation == GradAccumulation::kComputed) return;
  if (kept) ExpectKeptGrads();
  if (precision_.accumulation != GradAccumulation::kReducedByAutograd) return;
  for (const size_t i : trainable_) {
    if (ReduceDtype(i) == GradDtype(i)) continue;
    std::optional<at::ScalarType> dtype = kept ? ReduceDtype(i) : GradDtype(i);
    // Autograd adds in place to what is there, whatever the term's dtype: it needs no cast.
    at::Tensor& leaf = full_[i].leaf;
    if (leaf.grad().defined()) dtype.reset();
    if (leaf.grad_dtype() != dtype) leaf.set_grad_dtype(dtype);
  }
}

void ParamGroup::KeepGrads() {
  if (precision_.accumulation == GradAccumulation::kComputed) return;
  grad_form_ = GradForm::kReduced;
  for (const size_t i : trainable_) {
    at::Tensor& grad = full_[i].leaf.mutable_grad();
    if (grad.defined()) grad = grad.detach().to(ReduceDtype(i));
  }
}

// Peers may have waiting gradients where this rank has none: the form is that of all ranks.
void ParamGroup::StartReduce() {
  std::vector<at::Tensor> grads;
  grads.reserve(trainable_.size());
  for (const size_t i : trainable_) {
    at::Tensor grad = std::exchange(full_[i].leaf.mutable_grad(), {});
    const bool fresh = grad.defined() && grad.scalar_type() == GradDtype(i);
    if (grad_form_ == GradForm::kReduced && fresh) grad = grad.to(ReduceDtype(i));
    if (grad.defined() && params_[i].is_dtensor) grad = local_grad_(i, grad);
    grads.push_back(std::move(grad));
  }
  reducer_->Start(std::move(grads), grad_form_, reduce_options_);
  grad_form_ = GradForm::kComputed;
}

void ParamGroup::DropGrads() {
  for (const size_t i : trainable_) full_[i].leaf.mutable_grad().reset();
}

void ParamGroup::DropKept() {
  DropGrads();
  grad_form_ = GradForm::kComputed;
  if (reducer_) reducer_->DropPartial();
}

}  // namespace hsdp_ckpt::hsdp
