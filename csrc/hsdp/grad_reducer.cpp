#include "hsdp/grad_reducer.h"

#include <algorithm>
#include <utility>

#include "kernels/batched_copy.h"

namespace hsdp_ckpt {
namespace {

constexpr int64_t kAlignment = 16;  // bytes

char* At(const at::Tensor& tensor, int64_t element) {
  return static_cast<char*>(tensor.mutable_data_ptr()) + element * static_cast<int64_t>(tensor.element_size());
}

ParamShape Shape(const std::vector<int64_t>& sizes) {
  int64_t row = 1;
  for (size_t d = 1; d < sizes.size(); ++d) row *= sizes[d];
  return {sizes.at(0), row};
}

}  // namespace

GradReducer::GradReducer(std::vector<std::vector<int64_t>> sizes, std::vector<at::ScalarType> dtypes, at::Device device,
                         std::shared_ptr<Collectives> collectives, std::shared_ptr<DeviceStreams> streams)
    : sizes_(std::move(sizes)),
      device_(device),
      collectives_(std::move(collectives)),
      streams_(std::move(streams)),
      used_here_(sizes_.size(), false) {
  std::vector<at::ScalarType> kinds;  // in order of first use: the same on all ranks
  for (const at::ScalarType dtype : dtypes) {
    if (std::find(kinds.begin(), kinds.end(), dtype) == kinds.end()) kinds.push_back(dtype);
  }
  for (const at::ScalarType dtype : kinds) {
    std::vector<size_t> params;
    std::vector<ParamShape> shapes;
    for (size_t i = 0; i < sizes_.size(); ++i) {
      if (dtypes[i] != dtype) continue;
      params.push_back(i);
      shapes.push_back(Shape(sizes_[i]));
    }
    const int64_t align = std::max<int64_t>(1, kAlignment / static_cast<int64_t>(c10::elementSize(dtype)));
    ShardLayout layout(std::move(shapes), collectives_->shards(), align);
    const int64_t flags = static_cast<int64_t>(params.size());
    const int64_t stride = layout.flat_numel() + (flags + align - 1) / align * align;
    at::Tensor ones = at::ones({flags}, at::TensorOptions(dtype).device(device_));
    buckets_.push_back({dtype, std::move(params), std::move(layout), stride, std::move(ones), {}, {}, nullptr});
  }
}

void GradReducer::Pack(Bucket& bucket, const std::vector<at::Tensor>& grads) {
  const ShardLayout& layout = bucket.layout;
  const int64_t shards = layout.shards();
  bucket.input = at::empty({shards * bucket.stride}, bucket.ones.options());
  std::vector<CopySegment> segments;
  segments.reserve((bucket.params.size() * 2 + 2) * static_cast<size_t>(shards));
  const auto zeros = [&](int64_t offset, int64_t numel) {
    if (numel > 0) segments.push_back({nullptr, At(bucket.input, offset), numel});
  };
  for (int64_t rank = 0; rank < shards; ++rank) {
    const int64_t base = rank * bucket.stride;
    for (size_t p = 0; p < bucket.params.size(); ++p) {
      const at::Tensor& grad = grads[bucket.params[p]];
      const int64_t numel = grad.defined() ? layout.shard_numel(p, rank) : 0;
      const int64_t end = p + 1 < bucket.params.size() ? layout.offset(p + 1) : layout.flat_numel();
      if (numel > 0) {
        const char* from = At(grad, layout.first_row(p, rank) * layout.param(p).row_size);
        segments.push_back({from, At(bucket.input, base + layout.offset(p)), numel});
      }
      // Padding and missing gradients: zeros, since the sum over ranks reads them.
      zeros(base + layout.offset(p) + numel, end - layout.offset(p) - numel);
    }
    int64_t flag = base + layout.flat_numel();
    for (size_t p = 0; p < bucket.params.size(); ++p, ++flag) {
      if (grads[bucket.params[p]].defined()) {
        segments.push_back({At(bucket.ones, static_cast<int64_t>(p)), At(bucket.input, flag), 1});
      } else {
        zeros(flag, 1);
      }
    }
    zeros(flag, base + bucket.stride - flag);
  }
  BatchedCopy(device_, segments, bucket.dtype, bucket.dtype, collectives_->PreScale(bucket.dtype));
}

void GradReducer::Start(std::vector<at::Tensor> grads) {
  TORCH_CHECK(stage_ == Stage::kIdle, "GradReducer: the last reduction has not been taken");
  TORCH_CHECK(grads.size() == sizes_.size(), "GradReducer: ", grads.size(), " gradients for ", sizes_.size(),
              " parameters");
  for (Bucket& bucket : buckets_) {
    for (const size_t i : bucket.params) {
      at::Tensor& grad = grads[i];
      used_here_[i] = grad.defined();
      if (!grad.defined()) continue;
      TORCH_CHECK(grad.layout() == at::kStrided, "a gradient of sizes ", grad.sizes(),
                  " is sparse; sharded parameters need dense gradients (nn.Embedding(sparse=False))");
      TORCH_CHECK(grad.scalar_type() == bucket.dtype && grad.device() == device_, "a gradient of sizes ", grad.sizes(),
                  " is ", grad.scalar_type(), " on ", grad.device(), ", its parameter is ", bucket.dtype, " on ", device_);
      grad = grad.detach().contiguous();
    }
    Pack(bucket, grads);
  }
  // Allocated and last used on the compute stream, by the packing.
  grads.clear();
  const auto scope = streams_->Enter(DeviceStreams::Stream::kReduce);
  for (Bucket& bucket : buckets_) {
    if (bucket.layout.shards() == 1) {
      bucket.output = bucket.input;
      continue;
    }
    bucket.output = at::empty({bucket.stride}, bucket.ones.options());
    bucket.work = collectives_->ReduceScatter(bucket.output, bucket.input);
    if (bucket.work && !device_.is_cpu()) std::exchange(bucket.work, nullptr)->wait();
  }
  stage_ = Stage::kScatter;
  // With streams the all-reduce queues up behind on its own; the host has nothing to wait for.
  if (!device_.is_cpu()) StartAllReduce();
}

void GradReducer::StartAllReduce() {
  const auto scope = streams_->Enter(DeviceStreams::Stream::kReduce);
  for (Bucket& bucket : buckets_) {
    if (bucket.input.defined()) streams_->Uses(bucket.input);  // allocated on the compute stream, read on this one
    bucket.input.reset();
    if (collectives_->replicas() == 1) continue;
    bucket.work = collectives_->AllReduce(bucket.output);
    if (bucket.work && !device_.is_cpu()) std::exchange(bucket.work, nullptr)->wait();
  }
  stage_ = Stage::kReduce;
}

bool GradReducer::Advance(bool wait) {
  const auto over = [&] {
    for (Bucket& bucket : buckets_) {
      if (!bucket.work) continue;
      if (!wait && !bucket.work->isCompleted()) return false;
      // Also of completed work: it rethrows what went wrong.
      std::exchange(bucket.work, nullptr)->wait();
    }
    return true;
  };
  if (stage_ == Stage::kScatter) {
    if (!over()) return false;
    StartAllReduce();
  }
  if (stage_ == Stage::kReduce) {
    if (!over()) return false;
    stage_ = Stage::kDone;
  }
  return stage_ == Stage::kDone;
}

std::vector<size_t> GradReducer::Unused() const {
  std::vector<size_t> unused;
  if (std::find(used_here_.begin(), used_here_.end(), false) == used_here_.end()) return unused;
  const auto scope = streams_->Enter(DeviceStreams::Stream::kReduce);
  for (const Bucket& bucket : buckets_) {
    const at::Tensor flags =
        bucket.output.narrow(0, bucket.layout.flat_numel(), static_cast<int64_t>(bucket.params.size())).ne(0).cpu();
    for (size_t p = 0; p < bucket.params.size(); ++p) {
      if (!flags.const_data_ptr<bool>()[p]) unused.push_back(bucket.params[p]);
    }
  }
  return unused;
}

std::vector<at::Tensor> GradReducer::EmptyShards() const {
  std::vector<at::Tensor> shards(sizes_.size());
  for (const Bucket& bucket : buckets_) {
    const at::Tensor buffer = at::empty({bucket.layout.flat_numel()}, bucket.ones.options());
    for (size_t p = 0; p < bucket.params.size(); ++p) {
      const int64_t rank = collectives_->shard_rank();
      std::vector<int64_t> sizes = sizes_[bucket.params[p]];
      sizes[0] = bucket.layout.shard_rows(p, rank);
      shards[bucket.params[p]] = buffer.narrow(0, bucket.layout.offset(p), bucket.layout.shard_numel(p, rank)).view(sizes);
    }
  }
  return shards;
}

void GradReducer::Write(const std::vector<std::optional<at::Tensor>>& targets, const std::vector<bool>& accumulate) {
  TORCH_CHECK(stage_ == Stage::kDone, "GradReducer: nothing has been reduced");
  TORCH_CHECK(targets.size() == sizes_.size() && accumulate.size() == sizes_.size(), "GradReducer: ", targets.size(),
              " targets for ", sizes_.size(), " parameters");
  const auto scope = streams_->Enter(DeviceStreams::Stream::kReduce);
  for (Bucket& bucket : buckets_) {
    const ShardLayout& layout = bucket.layout;
    for (const bool add : {false, true}) {
      std::vector<CopySegment> segments;
      for (size_t p = 0; p < bucket.params.size(); ++p) {
        const size_t i = bucket.params[p];
        if (!targets[i] || accumulate[i] != add) continue;
        const int64_t numel = layout.shard_numel(p, collectives_->shard_rank());
        TORCH_CHECK(
            targets[i]->numel() == numel && targets[i]->scalar_type() == bucket.dtype && targets[i]->is_contiguous(),
            "GradReducer: the gradient of parameter ", i, " is ", targets[i]->scalar_type(), " ", targets[i]->sizes(),
            "; expected ", numel, " contiguous elements of ", bucket.dtype);
        streams_->Uses(*targets[i]);
        if (numel > 0) segments.push_back({At(bucket.output, layout.offset(p)), targets[i]->mutable_data_ptr(), numel});
      }
      if (segments.empty()) continue;
      BatchedCopy(device_, segments, bucket.dtype, bucket.dtype, collectives_->PostScale(device_.type(), bucket.dtype),
                  add);
    }
  }
  written_ = streams_->Record(DeviceStreams::Stream::kReduce);
  Drop();
}

void GradReducer::Drop() {
  if (stage_ == Stage::kScatter || stage_ == Stage::kReduce) Advance(true);
  for (Bucket& bucket : buckets_) bucket.output.reset();
  stage_ = Stage::kIdle;
}

void GradReducer::Join() { streams_->Join(std::exchange(written_, nullptr).get()); }

}  // namespace hsdp_ckpt
