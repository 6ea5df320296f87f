#include <cstdlib>
#include <string_view>

#include "batched_copy_cases.h"
#ifdef HSDP_CKPT_WITH_CUDA
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#endif

// The same batches as on the CPU, and what only a GPU has: streams, graphs, room for more than 4
// GiB.
using batched_copy_cases::Check;
using batched_copy_cases::EdgeSizes;
using batched_copy_cases::kComputed;
using hsdp_ckpt::kernels::BatchedCopy;
using hsdp_ckpt::kernels::CopySegment;

namespace {

/// False, with a word to the reader, where there is no GPU; a failure where one was promised.
bool HasGpu() {
#ifdef HSDP_CKPT_WITH_CUDA
  if (at::globalContext().hasCUDA()) return true;
#endif
  const char* required = std::getenv("HSDP_CKPT_REQUIRE_GPU");
  if (required != nullptr && std::string_view(required) == "1")
    FAIL("HSDP_CKPT_REQUIRE_GPU=1, but there is no CUDA device");
  WARN("not run: no CUDA device");
  return false;
}

}  // namespace

TEST_CASE("CUDA: bits are copied whatever they mean", "[kernels][gpu]") {
  if (!HasGpu()) return;
  const auto type = GENERATE(at::kBool, at::kShort, at::kFloat, at::kLong, at::kHalf,
                             at::kComplexDouble, at::kFloat8_e4m3fn);
  const auto seed = GENERATE(take(3, random(0u, ~0u)));
  Check(at::kCUDA, type, type, EdgeSizes(), 1.0, false, seed);
}

TEST_CASE("CUDA: casts, scales and sums are ATen's to the last bit", "[kernels][gpu]") {
  if (!HasGpu()) return;
  const auto src = GENERATE(from_range(kComputed));
  const auto dst = GENERATE(from_range(kComputed));
  const auto scale = GENERATE(1.0, 1.0 / 3.0);
  const bool accumulate = GENERATE(false, true);
  const auto seed = GENERATE(take(2, random(0u, ~0u)));
  Check(at::kCUDA, src, dst, EdgeSizes(), scale, accumulate, seed);
}

TEST_CASE("CUDA: more segments than fit into a kernel's arguments", "[kernels][gpu]") {
  if (!HasGpu()) return;
  const int64_t count = GENERATE(119, 120, 121, 5000);
  Check(at::kCUDA, at::kFloat, at::kFloat, std::vector<int64_t>(count, 65), 1.0, false, 1);
  Check(at::kCUDA, at::kBFloat16, at::kFloat, std::vector<int64_t>(count, 129), 0.5, true, 2);
  Check(at::kCUDA, at::kFloat, at::kHalf, {1, 0, 5 << 18, 17, 3 << 16, 0, 300000, 1, 0}, 0.5, true,
        3);
}

#ifdef HSDP_CKPT_WITH_CUDA
namespace {

/// Adds `from` to `to` piece by piece; enough pieces for a table in device memory.
std::vector<CopySegment> Pieces(const at::Tensor& from, const at::Tensor& to, int64_t size) {
  std::vector<CopySegment> segments;
  for (int64_t at = 0; at < from.numel(); at += size) {
    segments.push_back({from.const_data_ptr<float>() + at, to.data_ptr<float>() + at,
                        std::min(size, from.numel() - at)});
  }
  return segments;
}

}  // namespace

TEST_CASE("CUDA: calls queue up on a side stream without waiting", "[kernels][gpu]") {
  if (!HasGpu()) return;
  const c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromPool());
  const auto options = at::TensorOptions().dtype(at::kFloat).device(at::kCUDA);
  const auto to = at::zeros({1 << 16}, options);
  auto expected = at::zeros({1 << 16}, options);
  // Each call has a table of its own, in memory that the earlier ones have just given back.
  for (int64_t i = 1; i <= 100; ++i) {
    const auto from = at::full({1 << 16}, i, options);
    BatchedCopy(at::kCUDA, Pieces(from, to, 64 + i), at::kFloat, at::kFloat, 1.0, true);
    expected.add_(from);
  }
  CHECK(at::equal(to, expected));
}

TEST_CASE("CUDA: a captured call can be replayed", "[kernels][gpu]") {
  if (!HasGpu()) return;
  const c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromPool());
  const auto options = at::TensorOptions().dtype(at::kFloat).device(at::kCUDA);
  const auto from = at::arange(1 << 15, options);
  const auto to = at::zeros({1 << 15}, options);
  at::cuda::CUDAGraph graph;
  graph.capture_begin();
  BatchedCopy(at::kCUDA, Pieces(from, to, 100), at::kFloat, at::kFloat, 1.0, true);
  graph.capture_end();
  for (int i = 0; i < 3; ++i) graph.replay();
  CHECK(at::equal(to, from * 3));
}

TEST_CASE("CUDA: more than 4 GiB and more than 2^31 elements", "[kernels][gpu]") {
  if (!HasGpu()) return;
  const int64_t n = (int64_t{1} << 32) + 12345;
  size_t free = 0, total = 0;
  REQUIRE(cudaMemGetInfo(&free, &total) == cudaSuccess);
  if (free < (size_t{32} << 30)) {
    WARN("not run: this GPU has less than 32 GiB free");
    return;
  }
  {
    const auto options = at::TensorOptions().dtype(at::kByte).device(at::kCUDA);
    const auto from = at::randint(256, {n}, options);
    const auto to = at::zeros({n}, options);
    const CopySegment segment{from.const_data_ptr(), to.data_ptr(), n};
    BatchedCopy(at::kCUDA, {&segment, 1}, at::kByte, at::kByte);
    CHECK(at::equal(from, to));
  }
  const int64_t m = (int64_t{1} << 31) + 777;
  const auto from = at::randn({m}, at::TensorOptions().dtype(at::kBFloat16).device(at::kCUDA));
  const auto to = at::zeros({m}, from.options().dtype(at::kFloat));
  const CopySegment segment{from.const_data_ptr(), to.data_ptr(), m};
  BatchedCopy(at::kCUDA, {&segment, 1}, at::kBFloat16, at::kFloat);
  for (int64_t at = 0; at < m; at += int64_t{1} << 28) {
    const int64_t end = std::min(m, at + (int64_t{1} << 28));
    CHECK(at::equal(from.slice(0, at, end).to(at::kFloat), to.slice(0, at, end)));
  }
}
#endif
