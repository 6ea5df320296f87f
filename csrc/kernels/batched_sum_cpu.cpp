#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>

#include "kernels/batched_copy.h"
#include "kernels/cast_cpu.h"
#include "kernels/copied_bytes.h"
#include "kernels/pieces_cpu.h"

namespace hsdp_ckpt::kernels {
namespace {

// Elements that are summed at a time: their partial sums stay in the first cache, so that memory is
// read and written once.
constexpr int64_t kBlock = 1024;

template <typename Src, typename Dst, bool kAccumulate>
void SumAll(std::span<const SumSegment> segments, int64_t item, double scale) {
  using C = ComputeType<Src, Dst>;
  ForEachPiece(segments, item, [scale](const SumSegment& segment, int64_t first, int64_t n) {
    Dst* dst = static_cast<Dst*>(segment.dst) + first;
    if (segment.srcs.empty()) {
      if (!kAccumulate)
        std::memset(static_cast<void*>(dst), 0, static_cast<size_t>(n) * sizeof(Dst));
      return;
    }
    alignas(64) C sums[kBlock];
    for (int64_t at = 0; at < n; at += kBlock) {
      const int64_t count = std::min(kBlock, n - at);
      const auto src = [&](size_t i) {
        return static_cast<const Src*>(segment.srcs[i]) + first + at;
      };
      CastRun<Src, C, false>(src(0), sums, count, 1.0, false);
      for (size_t i = 1; i < segment.srcs.size(); ++i)
        CastRun<Src, C, true>(src(i), sums, count, 1.0, false);
      CastRun<C, Dst, kAccumulate>(sums, dst + at, count, scale, false);
    }
  });
}

}  // namespace

void BatchedSum(std::span<const SumSegment> segments, c10::ScalarType src, c10::ScalarType dst,
                double scale, bool accumulate) {
  TORCH_CHECK_TYPE(Computes(src) && Computes(dst), "BatchedSum: ", src, " to ", dst,
                   " is not supported: float32, float64, bfloat16 and float16 are summed");
  const size_t src_item = c10::elementSize(src), dst_item = c10::elementSize(dst);
  size_t most = 0;
  for (size_t i = 0; i < segments.size(); ++i) {
    const SumSegment& segment = segments[i];
    TORCH_CHECK_VALUE(segment.numel >= 0, "BatchedSum: segment ", i, " has ", segment.numel,
                      " elements");
    TORCH_CHECK_VALUE(segment.numel == 0 || segment.dst != nullptr, "BatchedSum: segment ", i,
                      " has no destination");
    bool aligned = reinterpret_cast<uintptr_t>(segment.dst) % dst_item == 0;
    for (const void* from : segment.srcs) {
      TORCH_CHECK_VALUE(segment.numel == 0 || from != nullptr, "BatchedSum: segment ", i,
                        " lacks a source");
      aligned = aligned && reinterpret_cast<uintptr_t>(from) % src_item == 0;
    }
    TORCH_CHECK_VALUE(aligned, "BatchedSum: segment ", i,
                      " lies at an address that is no multiple of its dtype's size");
    most = std::max(most, segment.srcs.size());
  }
  CountSum(segments, {src_item, dst_item, accumulate});
  const auto item = static_cast<int64_t>(most * src_item + dst_item);
  WithType(src, [&](auto s) {
    WithType(dst, [&](auto d) {
      if (accumulate) {
        SumAll<decltype(s), decltype(d), true>(segments, item, scale);
      } else {
        SumAll<decltype(s), decltype(d), false>(segments, item, scale);
      }
    });
  });
}

}  // namespace hsdp_ckpt::kernels
