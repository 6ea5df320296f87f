#include <ATen/Parallel.h>

#include "batched_copy_cases.h"

using batched_copy_cases::Check;
using batched_copy_cases::EdgeSizes;
using batched_copy_cases::kComputed;
using hsdp_ckpt::kernels::BatchedCopy;
using hsdp_ckpt::kernels::CopySegment;

TEST_CASE("bits are copied whatever they mean", "[kernels]") {
  const auto type = GENERATE(at::kBool, at::kByte, at::kShort, at::kInt, at::kLong, at::kFloat,
                             at::kDouble, at::kHalf, at::kBFloat16, at::kComplexFloat,
                             at::kComplexDouble, at::kFloat8_e4m3fn, at::kFloat8_e5m2);
  const auto seed = GENERATE(take(3, random(0u, ~0u)));
  Check(at::kCPU, type, type, EdgeSizes(), 1.0, false, seed);
}

TEST_CASE("casts, scales and sums are ATen's to the last bit", "[kernels]") {
  const auto src = GENERATE(from_range(kComputed));
  const auto dst = GENERATE(from_range(kComputed));
  const auto scale = GENERATE(1.0, 0.25, 1.0 / 3.0);
  const bool accumulate = GENERATE(false, true);
  const auto seed = GENERATE(take(2, random(0u, ~0u)));
  Check(at::kCPU, src, dst, EdgeSizes(), scale, accumulate, seed);
}

TEST_CASE("large pieces are shared out among threads", "[kernels]") {
  const auto threads = GENERATE(1, 3);
  const auto types =
      GENERATE(std::pair{at::kFloat, at::kFloat}, std::pair{at::kBFloat16, at::kFloat},
               std::pair{at::kFloat, at::kHalf});
  const int before = at::get_num_threads();
  at::set_num_threads(threads);
  Check(at::kCPU, types.first, types.second, {1, 0, 5 << 18, 17, 3 << 16, 0, 300000, 1, 0}, 1.0,
        false, 7);
  Check(at::kCPU, types.first, types.second, std::vector<int64_t>(20000, 65), 0.5, true, 8);
  at::set_num_threads(before);
}

TEST_CASE("a batch larger than the caches is the same", "[kernels]") {
  // Sizes around what a cache line and the stores past it need, among 36 MiB and more that make the
  // batch large.
  std::vector<int64_t> sizes{5 << 20, 0, 1023, 1024, 1025, 1039, 2047, 4099, 31, 1};
  Check(at::kCPU, at::kDouble, at::kDouble, sizes, 1.0, false, 1);
  Check(at::kCPU, at::kDouble, at::kHalf, sizes, 0.5, false, 2);
  sizes[0] = 6 << 20;
  Check(at::kCPU, at::kBFloat16, at::kFloat, sizes, 1.0, false, 3);
  Check(at::kCPU, at::kFloat, at::kBFloat16, sizes, 1.0, false, 4);
  Check(at::kCPU, at::kFloat, at::kBFloat16, sizes, 1.0, true, 5);
}

TEST_CASE("bits are copied from and to odd addresses", "[kernels]") {
  const auto from = GENERATE(0, 1, 3, 5);
  const auto to = GENERATE(0, 1, 2, 7);
  std::vector<uint8_t> src(2048), dst(2048, 0xA5);
  std::iota(src.begin(), src.end(), uint8_t{1});
  const CopySegment segment{src.data() + from, dst.data() + to, 401};
  BatchedCopy(at::kCPU, {&segment, 1}, at::kFloat, at::kFloat);
  CHECK(std::equal(dst.begin() + to, dst.begin() + to + 4 * 401, src.begin() + from));
  CHECK(std::all_of(dst.begin(), dst.begin() + to, [](uint8_t x) { return x == 0xA5; }));
  CHECK(std::all_of(dst.begin() + to + 4 * 401, dst.end(), [](uint8_t x) { return x == 0xA5; }));
}

TEST_CASE("what BatchedCopy cannot do it refuses", "[kernels]") {
  std::array<int64_t, 4> src{1, 2, 3, 4}, dst{};
  const CopySegment good{src.data(), dst.data(), 2}, negative{src.data(), dst.data(), -1},
      nowhere{src.data(), nullptr, 1};
  const CopySegment odd{reinterpret_cast<char*>(src.data()) + 1, dst.data(), 1};
  CHECK_THROWS_AS(BatchedCopy(at::kCPU, {&good, 1}, at::kLong, at::kInt), c10::TypeError);
  CHECK_THROWS_AS(BatchedCopy(at::kCPU, {&good, 1}, at::kLong, at::kLong, 0.5), c10::TypeError);
  CHECK_THROWS_AS(BatchedCopy(at::kCPU, {&good, 1}, at::kLong, at::kLong, 1.0, true),
                  c10::TypeError);
  CHECK_THROWS_AS(BatchedCopy(at::kCPU, {&good, 1}, at::kFloat8_e5m2, at::kFloat), c10::TypeError);
  CHECK_THROWS_AS(BatchedCopy(at::kCPU, {&negative, 1}, at::kLong, at::kLong), c10::ValueError);
  CHECK_THROWS_AS(BatchedCopy(at::kCPU, {&nowhere, 1}, at::kLong, at::kLong), c10::ValueError);
  CHECK_THROWS_AS(BatchedCopy(at::kCPU, {&odd, 1}, at::kFloat, at::kHalf), c10::ValueError);
  CHECK_THROWS_AS(BatchedCopy(at::kMeta, {&good, 1}, at::kLong, at::kLong), c10::ValueError);
  CHECK(dst == std::array<int64_t, 4>{});
  BatchedCopy(at::kCPU, {}, at::kLong, at::kLong);
}
