#include "hsdp/param_group.h"

#include <torch/csrc/autograd/utils/lambda_post_hook.h>

#include <algorithm>
#include <utility>

#include "kernels/batched_copy.h"

namespace hsdp_ckpt {
namespace {

constexpr int64_t kShardAlignment = 16;  // bytes: what vector loads and the record format ask for
constexpr int64_t kFullAlignment = 256;  // bytes: what matrix kernels ask for to use their widest loads

ParamShape ByteShape(const std::vector<int64_t>& sizes, at::ScalarType dtype) {
  int64_t row = static_cast<int64_t>(c10::elementSize(dtype));
  for (size_t d = 1; d < sizes.size(); ++d) row *= sizes[d];
  return {sizes.at(0), row};
}

uint8_t* Bytes(const at::Tensor& tensor) { return static_cast<uint8_t*>(tensor.mutable_data_ptr()); }

void SetMemory(const at::Tensor& tensor, void* data, int64_t nbytes) {
  c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
  // No deleter: the buffer belongs to the group, which takes the pointers back before it lets go of it.
  storage->set_data_ptr_noswap(at::DataPtr(data, tensor.device()));
  storage->set_nbytes(static_cast<size_t>(nbytes));
}

}  // namespace

ParamGroup::ParamGroup(std::vector<std::vector<int64_t>> sizes, std::vector<at::ScalarType> dtypes, at::Device device,
                       std::shared_ptr<Collectives> collectives)
    : sizes_(std::move(sizes)),
      dtypes_(std::move(dtypes)),
      device_(device),
      collectives_(std::move(collectives)),
      streams_(DeviceStreams::Of(device)) {
  TORCH_CHECK(sizes_.size() == dtypes_.size(), "ParamGroup: ", sizes_.size(), " sizes and ", dtypes_.size(), " dtypes");
  for (const auto& s : sizes_) TORCH_CHECK(!s.empty(), "ParamGroup: a parameter of no dimension can't be sharded");
  MakeLayout();
}

ParamGroup::~ParamGroup() {
  // The full parameters may outlive the group in somebody's hands; they must not point into its memory then.
  for (const at::Tensor& full : full_) SetMemory(full, nullptr, 0);
}

void ParamGroup::MakeLayout() {
  std::vector<ParamShape> shapes;
  full_offsets_.assign(1, 0);
  for (size_t i = 0; i < sizes_.size(); ++i) {
    shapes.push_back(ByteShape(sizes_[i], dtypes_[i]));
    full_offsets_.push_back((full_offsets_[i] + shapes[i].numel() + kFullAlignment - 1) / kFullAlignment * kFullAlignment);
  }
  layout_.emplace(std::move(shapes), collectives_->shards(), kShardAlignment);
  shard_offsets_.clear();
  for (size_t i = 0; i < sizes_.size(); ++i) shard_offsets_.push_back(layout_->offset(i));
}

std::vector<at::Tensor> ParamGroup::ShardTensors() const {
  std::vector<at::Tensor> shards;
  for (size_t i = 0; i < sizes_.size(); ++i) {
    std::vector<int64_t> sizes = sizes_[i];
    sizes[0] = layout_->shard_rows(i, collectives_->shard_rank());
    // A storage of its own that keeps the flat buffer: saving or copying the tensor takes its own bytes only.
    shards.push_back(at::from_blob(
        Bytes(flat_) + layout_->offset(i), sizes, [flat = flat_](void*) {}, at::TensorOptions(dtypes_[i]).device(device_)));
  }
  return shards;
}

std::vector<at::Tensor> ParamGroup::ShardFull(const std::vector<at::Tensor>& full) {
  TORCH_CHECK(full.size() == sizes_.size(), "ParamGroup: ", full.size(), " tensors for ", sizes_.size(), " parameters");
  std::vector<at::Tensor> own;
  for (size_t i = 0; i < full.size(); ++i) {
    TORCH_CHECK(full[i].sizes() == at::IntArrayRef(sizes_[i]) && full[i].scalar_type() == dtypes_[i],
                "ParamGroup: parameter ", i, " is ", full[i].sizes(), ", expected ", at::IntArrayRef(sizes_[i]));
    const int64_t rank = collectives_->shard_rank();
    own.push_back(full[i].detach().narrow(0, layout_->first_row(i, rank), layout_->shard_rows(i, rank)));
  }
  return Rebind(own, device_);
}

std::vector<at::Tensor> ParamGroup::Rebind(const std::vector<at::Tensor>& shards, at::Device device) {
  TORCH_CHECK(shards.size() == sizes_.size(), "ParamGroup: ", shards.size(), " shards for ", sizes_.size(), " parameters");
  Reshard();
  const int64_t rank = collectives_->shard_rank();
  for (size_t i = 0; i < shards.size(); ++i) {
    std::vector<int64_t> expected = sizes_[i];
    expected[0] = layout_->shard_rows(i, rank);
    TORCH_CHECK(shards[i].sizes() == at::IntArrayRef(expected), "ParamGroup: the shard of parameter ", i, " is ",
                shards[i].sizes(), ", expected ", at::IntArrayRef(expected));
  }
  device_ = device;
  streams_ = DeviceStreams::Of(device);
  for (size_t i = 0; i < shards.size(); ++i) dtypes_[i] = shards[i].scalar_type();
  MakeLayout();
  // Padding is sent along by every gather: zeros, so that nothing uninitialised ever leaves the process.
  flat_ = at::zeros({layout_->flat_numel()}, at::TensorOptions(at::kByte).device(device_));
  std::vector<at::Tensor> bound = ShardTensors();
  for (size_t i = 0; i < shards.size(); ++i) bound[i].copy_(shards[i].detach());
  return bound;
}

std::vector<at::Tensor> ParamGroup::EmptyFull() const {
  std::vector<at::Tensor> full;
  for (size_t i = 0; i < sizes_.size(); ++i) {
    full.push_back(at::empty(sizes_[i], at::TensorOptions(dtypes_[i]).device(device_)));
    SetMemory(full.back(), nullptr, 0);
  }
  return full;
}

void ParamGroup::BindFull(std::vector<at::Tensor> full, std::vector<size_t> trainable,
                          std::function<void(size_t)> on_grad) {
  TORCH_CHECK(full.size() == sizes_.size(), "ParamGroup: ", full.size(), " tensors for ", sizes_.size(), " parameters");
  Reshard();
  full_ = std::move(full);
  trainable_ = std::move(trainable);
  on_grad_ = std::make_shared<std::function<void(size_t)>>(std::move(on_grad));
  accumulators_.clear();
  std::vector<std::vector<int64_t>> sizes;
  std::vector<at::ScalarType> dtypes;
  for (size_t slot = 0; slot < trainable_.size(); ++slot) {
    const size_t i = trainable_[slot];
    sizes.push_back(sizes_.at(i));
    dtypes.push_back(dtypes_.at(i));
    auto accumulator = torch::autograd::impl::grad_accumulator(full_[i]);
    // Weak: a graph may outlive the group. In C++, so that a parameter's arrival costs no GIL.
    accumulator->add_post_hook(std::make_unique<torch::autograd::utils::LambdaPostHook>(
        [weak = std::weak_ptr<std::function<void(size_t)>>(on_grad_), slot](const torch::autograd::variable_list& outputs,
                                                                            const torch::autograd::variable_list&) {
          if (const auto call = weak.lock()) (*call)(slot);
          return outputs;
        }));
    accumulators_.push_back(std::move(accumulator));
  }
  reducer_ = std::make_unique<GradReducer>(std::move(sizes), std::move(dtypes), device_, collectives_, streams_);
}

void ParamGroup::StartGather() {
  if (state_ != State::kSharded) return;
  if (collectives_->shards() > 1 && layout_->flat_numel() > 0) {
    const auto scope = streams_->Enter(DeviceStreams::Stream::kGather);
    packed_ = at::empty({collectives_->shards() * layout_->flat_numel()}, flat_.options());
    gather_work_ = collectives_->AllGather(packed_, flat_);
    // On CUDA a backend that returns work (Gloo) is waited for here, under the stream: the mark then says it all.
    if (gather_work_ && !flat_.is_cpu()) std::exchange(gather_work_, nullptr)->wait();
    gather_mark_ = streams_->Record(DeviceStreams::Stream::kGather);
  }
  state_ = State::kGathering;
}

void ParamGroup::Unshard() {
  if (state_ == State::kUnsharded) return;
  StartGather();
  if (collectives_->shards() == 1 || layout_->flat_numel() == 0) {
    Lend(Bytes(flat_), shard_offsets_);  // the shard is the whole
    state_ = State::kUnsharded;
    return;
  }
  if (gather_work_) std::exchange(gather_work_, nullptr)->wait();
  streams_->Join(gather_mark_.get());
  lent_ = at::empty({full_offsets_.back()}, flat_.options());
  std::vector<CopySegment> segments;
  segments.reserve(sizes_.size() * static_cast<size_t>(collectives_->shards()));
  for (size_t i = 0; i < sizes_.size(); ++i) {
    const int64_t row = layout_->param(i).row_size;
    for (int64_t rank = 0; rank < collectives_->shards(); ++rank) {
      const int64_t bytes = layout_->shard_numel(i, rank);
      if (bytes == 0) continue;
      segments.push_back({Bytes(packed_) + rank * layout_->flat_numel() + layout_->offset(i),
                          Bytes(lent_) + full_offsets_[i] + layout_->first_row(i, rank) * row, bytes});
    }
  }
  BatchedCopy(device_, segments, at::kByte, at::kByte);
  streams_->Uses(packed_);
  packed_.reset();
  gather_mark_.reset();
  Lend(Bytes(lent_), full_offsets_);
  state_ = State::kUnsharded;
}

void ParamGroup::Lend(uint8_t* base, const std::vector<int64_t>& offsets) {
  for (size_t i = 0; i < full_.size(); ++i) SetMemory(full_[i], base + offsets[i], layout_->param(i).numel());
}

void ParamGroup::Reshard() {
  if (state_ == State::kUnsharded) {
    for (const at::Tensor& full : full_) SetMemory(full, nullptr, 0);
    lent_.reset();  // allocated and used on the compute stream: the allocator keeps that order by itself
  } else if (state_ == State::kGathering) {
    if (gather_work_) std::exchange(gather_work_, nullptr)->wait();
    packed_.reset();  // allocated and used on the gather stream
    gather_mark_.reset();
  }
  state_ = State::kSharded;
}

void ParamGroup::StartReduce() {
  std::vector<at::Tensor> grads;
  grads.reserve(trainable_.size());
  for (const size_t i : trainable_) {
    grads.push_back(full_[i].grad());
    full_[i].mutable_grad().reset();
  }
  reducer_->Start(std::move(grads));
}

void ParamGroup::DropGrads() {
  for (const size_t i : trainable_) full_[i].mutable_grad().reset();
}

}  // namespace hsdp_ckpt
