// Compiled in builds with tests only.
#include "kernels/copied_bytes.h"

#include <atomic>

namespace hsdp_ckpt::kernels {
namespace {

std::atomic<int64_t> copied_bytes{0};  // of the process: kernels run in several of its threads

void Count(int64_t numel, size_t sources, MovedItems items) {
  const size_t at_destination = (items.accumulate ? 2 : 1) * items.dst;
  const auto bytes = static_cast<int64_t>(sources * items.src + at_destination);
  copied_bytes.fetch_add(numel * bytes, std::memory_order_relaxed);
}

}  // namespace

int64_t CopiedBytes() { return copied_bytes.load(std::memory_order_relaxed); }

void CountCopy(std::span<const CopySegment> segments, MovedItems items) {
  for (const CopySegment& segment : segments) {
    Count(segment.numel, segment.src == nullptr ? 0 : 1, items);
  }
}

void CountSum(std::span<const SumSegment> segments, MovedItems items) {
  for (const SumSegment& segment : segments) Count(segment.numel, segment.srcs.size(), items);
}

}  // namespace hsdp_ckpt::kernels
