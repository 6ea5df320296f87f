#include "hsdp/grad_bucket.h"

#include <algorithm>
#include <utility>

#include "kernels/batched_copy.h"

namespace hsdp_ckpt::hsdp {
namespace {

constexpr int64_t kAlignment = 16;  // bytes

std::vector<ParamShape> Shapes(const std::vector<size_t>& params,
                               const std::vector<std::vector<int64_t>>& sizes, int64_t shards) {
  std::vector<ParamShape> shapes;
  for (const size_t i : params) shapes.push_back(ParamShape::Of(sizes[i], shards));
  return shapes;
}

std::vector<size_t> Joined(std::vector<size_t> first, const std::vector<size_t>& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

int64_t AlignmentOf(at::ScalarType a, at::ScalarType b) {
  return kAlignment / static_cast<int64_t>(std::min(c10::elementSize(a), c10::elementSize(b)));
}

const void* At(const at::Tensor& tensor, int64_t element) {
  return static_cast<const char*>(tensor.const_data_ptr()) +
         element * static_cast<int64_t>(tensor.element_size());
}

}  // namespace

GradReducer::Bucket::Bucket(at::ScalarType computed_dtype, at::ScalarType reduced_dtype,
                            std::vector<size_t> in_place_params, const std::vector<size_t>& packed,
                            const std::vector<std::vector<int64_t>>& sizes, int64_t shards,
                            at::Device device, bool exchanges)
    : computed(computed_dtype),
      reduced(reduced_dtype),
      wire(exchanges && shards > 1 ? Wire(computed, reduced) : reduced),
      params(Joined(in_place_params, packed)),
      in_place(in_place_params.size()),
      layout(Shapes(params, sizes, shards), shards, AlignmentOf(computed, reduced)),
      ones(at::ones({static_cast<int64_t>(params.size())},
                    at::TensorOptions(computed).device(device))) {
  const int64_t align = AlignmentOf(computed, reduced), flags = static_cast<int64_t>(params.size());
  packed_begin = in_place < params.size() ? layout.offset(in_place) : layout.flat_numel();
  const auto whole =
      std::find_if(params.begin(), params.end(), [&](size_t i) { return sizes[i].empty(); });
  whole_begin = whole != params.end() ? layout.offset(static_cast<size_t>(whole - params.begin()))
                                      : layout.flat_numel();
  stride = layout.flat_numel() + (flags + align - 1) / align * align;
}

at::ScalarType GradReducer::Bucket::Wire(at::ScalarType computed, at::ScalarType reduced) {
  const bool holds = reduced == computed || reduced == at::kDouble ||
                     (reduced == at::kFloat && computed != at::kDouble);
  return holds ? computed : reduced;
}

std::vector<Cut> GradReducer::Bucket::Runs() const {
  std::vector<Cut> runs;
  for (size_t p = 0; p < in_place; ++p) {
    runs.push_back({grads[p], {}});
    for (int64_t r = 0; r <= layout.shards(); ++r) {
      runs.back().bounds.push_back(layout.first_row(p, r) * layout.param(p).row_size);
    }
  }
  runs.push_back({input, {}});
  for (int64_t r = 0; r <= layout.shards(); ++r) runs.back().bounds.push_back(r * packed_stride());
  return runs;
}

std::vector<at::Tensor> GradReducer::Bucket::Pieces(const at::Tensor& buffer, int64_t rank) const {
  std::vector<at::Tensor> pieces;
  for (size_t p = 0; p < in_place; ++p)
    pieces.push_back(buffer.narrow(0, layout.offset(p), layout.shard_numel(p, rank)));
  pieces.push_back(buffer.narrow(0, packed_begin, packed_stride()));
  return pieces;
}

void GradReducer::Bucket::Sum(int64_t rank, double scale) {
  const auto first_peer = static_cast<size_t>(rank == 0 ? 1 : 0);
  // In place of a peer's pieces where the dtype allows it: what is summed is in the cache then.
  output = wire == reduced ? inbox[first_peer] : at::empty({stride}, ones.options().dtype(reduced));
  auto* out = static_cast<char*>(output.mutable_data_ptr());
  const auto item = static_cast<int64_t>(output.element_size());
  std::vector<kernels::SumSegment> segments;
  const auto add = [&](int64_t offset, int64_t numel, const void* own) {
    kernels::SumSegment segment{{}, out + offset * item, numel};
    for (int64_t r = 0; r < layout.shards(); ++r) {
      segment.srcs.push_back(r == rank ? own : At(inbox[static_cast<size_t>(r)], offset));
    }
    segments.push_back(std::move(segment));
  };
  for (size_t p = 0; p < in_place; ++p) {
    const int64_t numel = layout.shard_numel(p, rank);
    const int64_t end = p + 1 < params.size() ? layout.offset(p + 1) : layout.flat_numel();
    add(layout.offset(p), numel,
        At(grads[p], layout.first_row(p, rank) * layout.param(p).row_size));
    // Padding goes to the other replicas: zeros, so that nothing uninitialised ever leaves the
    // process.
    if (const int64_t gap = layout.offset(p) + numel; gap < end)
      segments.push_back({{}, out + gap * item, end - gap});
  }
  add(packed_begin, packed_stride(), At(input, rank * packed_stride()));
  kernels::BatchedSum(segments, wire, reduced, scale);
  grads.clear();
  input.reset();
  inbox.clear();
}

void GradReducer::Bucket::AddPartial() {
  if (!partial.defined()) return;
  const kernels::CopySegment all{partial.const_data_ptr(), output.mutable_data_ptr(), stride};
  kernels::BatchedCopy(output.device(), {&all, 1}, reduced, reduced, 1.0, /*accumulate=*/true);
  partial.reset();
}

void GradReducer::Bucket::Clear() {
  grads.clear();
  inbox.clear();
  works.clear();
  input.reset();
  output.reset();
  other.reset();
  is_average = false;
}

}  // namespace hsdp_ckpt::hsdp
