#include <c10/util/Exception.h>

#include <cstring>

#include "kernels/batched_copy.h"
#include "kernels/cast_cpu.h"
#include "kernels/pieces_cpu.h"

namespace hsdp_ckpt::kernels {
namespace {

// From here on a batch is taken to be larger than the caches: what is written would be gone from
// them before it is read.
constexpr int64_t kStreamBytes = 32 << 20;

/// Whether copying all `segments` moves that much; `item` is the bytes that one element moves.
bool Streams(std::span<const CopySegment> segments, int64_t item) {
  int64_t total = 0;
  for (const auto& segment : segments) total += segment.numel;
  return total * item >= kStreamBytes;
}

template <typename Src, typename Dst, bool kAccumulate>
void CastAll(std::span<const CopySegment> segments, double scale) {
  constexpr int64_t kItem = sizeof(Src) + sizeof(Dst);
  const bool stream = Streams(segments, kItem);
  ForEachPiece(segments, kItem,
               [scale, stream](const CopySegment& segment, int64_t first, int64_t n) {
                 Dst* dst = static_cast<Dst*>(segment.dst) + first;
                 if (segment.src != nullptr) {
                   CastRun<Src, Dst, kAccumulate>(static_cast<const Src*>(segment.src) + first, dst,
                                                  n, scale, stream);
                 } else if (!kAccumulate) {
                   std::memset(static_cast<void*>(dst), 0, static_cast<size_t>(n) * sizeof(Dst));
                 }
               });
}

}  // namespace

void CopyCpu(std::span<const CopySegment> segments, int64_t item) {
  const bool stream = Streams(segments, 2 * item);
  ForEachPiece(
      segments, 2 * item, [item, stream](const CopySegment& segment, int64_t first, int64_t n) {
        char* dst = static_cast<char*>(segment.dst) + first * item;
        if (segment.src != nullptr) {
          CopyRun(static_cast<const char*>(segment.src) + first * item, dst, n * item, stream);
        } else {
          std::memset(dst, 0, static_cast<size_t>(n * item));
        }
      });
}

void CastCpu(std::span<const CopySegment> segments, c10::ScalarType src, c10::ScalarType dst,
             double scale, bool accumulate) {
  WithType(src, [&](auto s) {
    WithType(dst, [&](auto d) {
      if (accumulate) {
        CastAll<decltype(s), decltype(d), true>(segments, scale);
      } else {
        CastAll<decltype(s), decltype(d), false>(segments, scale);
      }
    });
  });
}

}  // namespace hsdp_ckpt::kernels
