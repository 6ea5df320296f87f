#include "hsdp/param_group.h"

#include <torch/csrc/autograd/utils/lambda_post_hook.h>

#include <algorithm>
#include <utility>

#include "kernels/batched_copy.h"

namespace hsdp_ckpt::hsdp {
namespace {

constexpr int64_t kShardAlignment = 16;  // bytes: what vector loads and the record format ask for
constexpr int64_t kFullAlignment =
    256;  // bytes: what matrix kernels ask for to use their widest loads

uint8_t* Bytes(const at::Tensor& tensor) {
  return static_cast<uint8_t*>(tensor.mutable_data_ptr());
}

void SetMemory(const at::Tensor& tensor, void* data, int64_t nbytes) {
  c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
  // No deleter: the buffer belongs to the group, which takes the pointers back before it lets go of
  // it.
  storage->set_data_ptr_noswap(at::DataPtr(data, tensor.device()));
  storage->set_nbytes(static_cast<size_t>(nbytes));
}

}  // namespace

ParamGroup::ParamGroup(std::vector<std::vector<int64_t>> sizes, std::vector<at::ScalarType> dtypes,
                       Precision precision, at::Device device,
                       std::shared_ptr<Collectives> collectives)
    : sizes_(std::move(sizes)),
      dtypes_(std::move(dtypes)),
      precision_(precision),
      device_(device),
      collectives_(std::move(collectives)),
      streams_(DeviceStreams::Of(device)) {
  TORCH_CHECK(sizes_.size() == dtypes_.size(), "ParamGroup: ", sizes_.size(), " sizes and ",
              dtypes_.size(), " dtypes");
  for (const auto& dtype : {precision_.param_dtype, precision_.reduce_dtype}) {
    TORCH_CHECK_VALUE(!dtype || kernels::Computes(*dtype), "mixed precision in ", *dtype,
                      " is not served: pass float32, float64, bfloat16 or float16");
  }
  MakeLayout();
}

ParamGroup::~ParamGroup() {
  // The full parameters may outlive the group in somebody's hands; they must not point into its
  // memory then.
  for (const at::Tensor& full : full_) SetMemory(full, nullptr, 0);
}

ParamShape ParamGroup::ByteShape(size_t i, at::ScalarType dtype) const {
  return ParamShape::Of(sizes_[i], collectives_->shards(),
                        static_cast<int64_t>(c10::elementSize(dtype)));
}

at::ScalarType ParamGroup::FullDtype(size_t i) const {
  return precision_.param_dtype && kernels::Computes(dtypes_[i]) ? *precision_.param_dtype
                                                                 : dtypes_[i];
}

void ParamGroup::MakeLayout() {
  const int64_t shards = collectives_->shards(), rank = collectives_->shard_rank();
  std::vector<ParamShape> shapes;
  full_offsets_.assign(1, 0);
  is_whole_ = shards == 1;
  for (size_t i = 0; i < sizes_.size(); ++i) {
    shapes.push_back(ByteShape(i, dtypes_[i]));
    const int64_t bytes = ByteShape(i, FullDtype(i)).numel();
    full_offsets_.push_back((full_offsets_[i] + bytes + kFullAlignment - 1) / kFullAlignment *
                            kFullAlignment);
    is_whole_ = is_whole_ && FullDtype(i) == dtypes_[i];
  }
  layout_.emplace(std::move(shapes), shards, kShardAlignment);
  shard_offsets_.clear();
  for (size_t i = 0; i < sizes_.size(); ++i) shard_offsets_.push_back(layout_->offset(i));

  in_place_.clear();
  own_full_.clear();
  own_packed_.clear();
  unpack_.clear();
  packed_stride_ = 0;
  std::vector<size_t> packed;
  std::vector<int64_t> packed_offsets;
  const bool exchanges = collectives_->exchanges(device_.type());
  for (size_t i = 0; i < sizes_.size(); ++i) {
    const int64_t row = ByteShape(i, FullDtype(i)).row_size;
    const auto item = static_cast<int64_t>(c10::elementSize(FullDtype(i)));
    const int64_t own_rows = layout_->shard_rows(i, rank);
    Move own{shard_offsets_[i], full_offsets_[i] + layout_->first_row(i, rank) * row,
             own_rows * row / item, dtypes_[i], FullDtype(i)};
    const bool large = layout_->chunk_rows(i) * row >= kInPlaceBytes;
    if (shards == 1 ||
        (large && (exchanges || (collectives_->coalesces(device_.type()) && layout_->even(i))))) {
      own_full_.push_back(own);
      Cut cut;
      for (int64_t r = 0; r <= shards; ++r) cut.bounds.push_back(layout_->first_row(i, r) * row);
      in_place_.emplace_back(full_offsets_[i], std::move(cut));
      continue;
    }
    packed.push_back(i);
    packed_offsets.push_back(packed_stride_);
    packed_stride_ +=
        (layout_->chunk_rows(i) * row + kShardAlignment - 1) / kShardAlignment * kShardAlignment;
    own.to = packed_offsets.back();
    own_packed_.push_back(own);
    // Padding is sent along: zeros, so that nothing uninitialised ever leaves the process.
    const int64_t end = own.to + own_rows * row;
    if (end < packed_stride_)
      own_packed_.push_back({-1, end, packed_stride_ - end, at::kByte, at::kByte});
  }
  for (Move& move : own_packed_) move.to += rank * packed_stride_;
  for (size_t p = 0; p < packed.size(); ++p) {
    const size_t i = packed[p];
    const int64_t row = ByteShape(i, FullDtype(i)).row_size;
    for (int64_t r = 0; r < shards; ++r) {
      const int64_t bytes = layout_->shard_rows(i, r) * row;
      const int64_t from = r * packed_stride_ + packed_offsets[p],
                    to = full_offsets_[i] + layout_->first_row(i, r) * row;
      if (bytes > 0) unpack_.push_back({from, to, bytes, at::kByte, at::kByte});
    }
  }
  // One fused pass for each pair of dtypes.
  const auto by_dtypes = [](const Move& a, const Move& b) {
    return std::pair(a.src, a.dst) < std::pair(b.src, b.dst);
  };
  std::stable_sort(own_full_.begin(), own_full_.end(), by_dtypes);
  std::stable_sort(own_packed_.begin(), own_packed_.end(), by_dtypes);
}

void ParamGroup::Run(const std::vector<Move>& moves, const at::Tensor& from,
                     const at::Tensor& to) const {
  std::vector<kernels::CopySegment> segments;
  segments.reserve(moves.size());
  for (auto move = moves.begin(); move != moves.end(); ++move) {
    segments.push_back(
        {move->from < 0 ? nullptr : Bytes(from) + move->from, Bytes(to) + move->to, move->numel});
    const auto next = std::next(move);
    if (next != moves.end() && next->src == move->src && next->dst == move->dst) continue;
    kernels::BatchedCopy(device_, segments, move->src, move->dst);
    segments.clear();
  }
}

std::vector<at::Tensor> ParamGroup::ShardTensors() const {
  std::vector<at::Tensor> shards;
  for (size_t i = 0; i < sizes_.size(); ++i) {
    const std::vector<int64_t> sizes =
        ShardSizes(sizes_[i], layout_->shard_rows(i, collectives_->shard_rank()));
    // A storage of its own that keeps the flat buffer: saving or copying the tensor takes its own
    // bytes only. The device is named: asked of the address, a shard without elements at the
    // buffer's end has another one, or none.
    shards.push_back(at::from_blob(
        Bytes(flat_) + layout_->offset(i), sizes, [flat = flat_](void*) {},
        at::TensorOptions(dtypes_[i]).device(device_), flat_.device()));
  }
  return shards;
}

std::vector<at::Tensor> ParamGroup::ShardFull(const std::vector<at::Tensor>& full) {
  TORCH_CHECK(full.size() == sizes_.size(), "ParamGroup: ", full.size(), " tensors for ",
              sizes_.size(), " parameters");
  std::vector<at::Tensor> own;
  for (size_t i = 0; i < full.size(); ++i) {
    TORCH_CHECK(
        full[i].sizes() == at::IntArrayRef(sizes_[i]) && full[i].scalar_type() == dtypes_[i],
        "ParamGroup: parameter ", i, " is ", full[i].sizes(), ", expected ",
        at::IntArrayRef(sizes_[i]));
    const int64_t rank = collectives_->shard_rank();
    own.push_back(full[i].detach());
    if (!sizes_[i].empty())
      own[i] = own[i].narrow(0, layout_->first_row(i, rank), layout_->shard_rows(i, rank));
  }
  return Rebind(own, device_);
}

std::vector<at::Tensor> ParamGroup::Rebind(const std::vector<at::Tensor>& shards,
                                           at::Device device) {
  TORCH_CHECK(shards.size() == sizes_.size(), "ParamGroup: ", shards.size(), " shards for ",
              sizes_.size(), " parameters");
  CheckNoPartial();
  Reshard();
  const int64_t rank = collectives_->shard_rank();
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::vector<int64_t> expected = ShardSizes(sizes_[i], layout_->shard_rows(i, rank));
    TORCH_CHECK(shards[i].sizes() == at::IntArrayRef(expected),
                "ParamGroup: the shard of parameter ", i, " is ", shards[i].sizes(), ", expected ",
                at::IntArrayRef(expected));
  }
  device_ = device;
  streams_ = DeviceStreams::Of(device);
  for (size_t i = 0; i < shards.size(); ++i) dtypes_[i] = shards[i].scalar_type();
  MakeLayout();
  // Padding is sent along by every gather: zeros, so that nothing uninitialised ever leaves the
  // process.
  flat_ = at::zeros({layout_->flat_numel()}, at::TensorOptions(at::kByte).device(device_));
  std::vector<at::Tensor> bound = ShardTensors();
  for (size_t i = 0; i < shards.size(); ++i) bound[i].copy_(shards[i].detach());
  return bound;
}

std::vector<at::Tensor> ParamGroup::EmptyFull() const {
  std::vector<at::Tensor> full;
  for (size_t i = 0; i < sizes_.size(); ++i) {
    full.push_back(at::empty(sizes_[i], at::TensorOptions(FullDtype(i)).device(device_)));
    SetMemory(full.back(), nullptr, 0);
  }
  return full;
}

void ParamGroup::CheckNoPartial() const {
  TORCH_CHECK(
      !reducer_ || !reducer_->has_partial(), "unit ", name_,
      " holds gradients that are summed over its shards and not yet over the replicas: run a "
      "backward with "
      "set_requires_all_reduce(True) before its parameters' dtype, device or requires_grad change");
}

void ParamGroup::BindFull(std::vector<at::Tensor> full, std::vector<size_t> trainable,
                          std::function<void(size_t)> on_grad) {
  TORCH_CHECK(full.size() == sizes_.size(), "ParamGroup: ", full.size(), " tensors for ",
              sizes_.size(), " parameters");
  CheckNoPartial();
  // What backwards without a reduction have left here is for a later one, with the parameters that
  // are there then.
  std::vector<at::Tensor> kept(full.size());
  for (const size_t i : trainable_) kept[i] = full_[i].grad();
  for (size_t i = 0; i < kept.size(); ++i) {
    const bool trained = std::find(trainable.begin(), trainable.end(), i) != trainable.end();
    TORCH_CHECK(trained || !kept[i].defined(), "parameter ", i, " of unit ", name_,
                " holds a gradient that has not been reduced: run a backward that reduces (outside "
                "of no_sync, with "
                "set_requires_gradient_sync(True)), or call the model's zero_grad(), before the "
                "parameter is frozen");
  }
  Reshard();
  full_ = std::move(full);
  trainable_ = std::move(trainable);
  on_grad_ = std::make_shared<std::function<void(size_t)>>(std::move(on_grad));
  accumulators_.clear();
  std::vector<std::vector<int64_t>> sizes;
  std::vector<GradDtypes> dtypes;
  for (size_t slot = 0; slot < trainable_.size(); ++slot) {
    const size_t i = trainable_[slot];
    sizes.push_back(sizes_.at(i));
    const at::ScalarType computed = FullDtype(i);
    if (kept[i].defined()) full_[i].mutable_grad() = kept[i].to(full_[i].options());
    dtypes.push_back({computed, precision_.reduce_dtype.value_or(computed),
                      precision_.keep_low_precision_grads ? computed : dtypes_.at(i)});
    auto accumulator = torch::autograd::impl::grad_accumulator(full_[i]);
    // Weak: a graph may outlive the group. In C++, so that a parameter's arrival costs no GIL.
    accumulator->add_post_hook(std::make_unique<torch::autograd::utils::LambdaPostHook>(
        [weak = std::weak_ptr<std::function<void(size_t)>>(on_grad_), slot](
            const torch::autograd::variable_list& outputs, const torch::autograd::variable_list&) {
          if (const auto call = weak.lock()) (*call)(slot);
          return outputs;
        }));
    accumulators_.push_back(std::move(accumulator));
  }
  reducer_ = std::make_unique<GradReducer>(name_, std::move(sizes), std::move(dtypes), device_,
                                           collectives_, streams_);
}

void ParamGroup::StartGather() {
  if (state_ != State::kSharded) return;
  state_ = State::kGathering;
  if (is_whole_ || full_offsets_.back() == 0) return;
  // Allocated on the compute stream, where they are used and freed; the gather stream begins behind
  // it.
  lent_ = at::empty({full_offsets_.back()}, flat_.options());
  if (packed_stride_ > 0)
    packed_ = at::empty({collectives_->shards() * packed_stride_}, flat_.options());
  const auto scope = streams_->Enter(DeviceStreams::Stream::kGather);
  Run(own_full_, flat_, lent_);
  if (packed_stride_ > 0) Run(own_packed_, flat_, packed_);
  if (collectives_->shards() > 1) {
    std::vector<Cut> runs;
    for (const auto& [offset, cut] : in_place_)
      runs.push_back({lent_.narrow(0, offset, cut.bounds.back()), cut.bounds});
    if (packed_stride_ > 0) {
      runs.push_back({packed_, {}});
      for (int64_t r = 0; r <= collectives_->shards(); ++r)
        runs.back().bounds.push_back(r * packed_stride_);
    }
    // Gloo's works are waited for at their use, on CUDA too: a peer may have to take part in a
    // reduction of ours first.
    gather_works_ = collectives_->AllGather(runs);
  }
  gather_mark_ = streams_->Record(DeviceStreams::Stream::kGather);
}

void ParamGroup::AwaitGather() {
  Await(gather_works_, collectives_->rank(),
        [this] { return "the all-gather of unit '" + name_ + "'"; });
}

void ParamGroup::Unshard() {
  if (state_ == State::kUnsharded) return;
  StartGather();
  if (is_whole_) {
    Lend(Bytes(flat_), shard_offsets_);
  } else {
    AwaitGather();
    streams_->Join(gather_mark_.get());
    gather_mark_.reset();
    // The gather may have been started on another stream than the one that computes.
    if (lent_.defined()) streams_->Uses(lent_);
    if (packed_.defined()) {
      streams_->Uses(packed_);
      Run(unpack_, packed_, lent_);
    }
    packed_.reset();
    if (lent_.defined()) Lend(Bytes(lent_), full_offsets_);
  }
  state_ = State::kUnsharded;
}

void ParamGroup::Lend(uint8_t* base, const std::vector<int64_t>& offsets) {
  for (size_t i = 0; i < full_.size(); ++i) {
    SetMemory(full_[i], base + offsets[i], static_cast<int64_t>(full_[i].nbytes()));
  }
}

void ParamGroup::Reshard() {
  if (state_ == State::kUnsharded) {
    for (const at::Tensor& full : full_) SetMemory(full, nullptr, 0);
  } else if (state_ == State::kGathering) {
    // Peers count on the rows that this rank sends, and write into this buffer.
    AwaitGather();
    streams_->Join(gather_mark_.get());
    gather_mark_.reset();
    if (lent_.defined()) streams_->Uses(lent_);
    if (packed_.defined()) streams_->Uses(packed_);
  }
  state_ = State::kSharded;
  packed_.reset();
  lent_.reset();  // to the compute stream, which has used it last
}

void ParamGroup::StartReduce() {
  std::vector<at::Tensor> grads;
  grads.reserve(trainable_.size());
  for (const size_t i : trainable_) {
    grads.push_back(full_[i].grad());
    full_[i].mutable_grad().reset();
  }
  reducer_->Start(std::move(grads), reduce_options_);
}

void ParamGroup::DropGrads() {
  for (const size_t i : trainable_) full_[i].mutable_grad().reset();
}

void ParamGroup::DropKept() {
  DropGrads();
  if (reducer_) reducer_->DropPartial();
}

}  // namespace hsdp_ckpt::hsdp
