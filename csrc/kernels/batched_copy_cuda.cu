#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/Allocator.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <limits>
#include <source_location>
#include <type_traits>
#include <vector>

#include "base/left_out.h"
#include "kernels/batched_copy.h"
#include "kernels/batched_copy_device.h"

namespace hsdp_ckpt::kernels {
namespace {

/// Calls `launch(table, blocks, stream)` for all segments: once, with the table as an argument or,
/// where it is too long for that, in device memory. A captured graph would replay a table that is
/// long gone, so there it is several launches.
template <typename Launch>
void ForEachTable(c10::Device device, std::span<const CopySegment> segments, int64_t item,
                  int64_t tile, const Launch& launch) {
  const auto place = std::source_location::current();
  c10::cuda::OptionalCUDAGuard guard;
  if (!base::IsLeftOut(base::Ordering::kWithin, place)) guard.set_device(device);
  const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
  std::vector<Entry> entries;
  entries.reserve(segments.size());
  for (const auto& [src, dst, numel] : segments) {
    if (numel > 0)
      entries.push_back({static_cast<const char*>(src), static_cast<char*>(dst), numel * item, 0});
  }
  const auto number = [&](std::span<Entry> part) {
    int64_t tiles = 0;
    for (Entry& entry : part) {
      entry.first_tile = tiles;
      tiles += (entry.numel + tile - 1) / tile;
    }
    TORCH_CHECK(tiles <= std::numeric_limits<int32_t>::max(),
                "BatchedCopy: more elements than one launch can take");
    return static_cast<unsigned>(tiles);
  };
  const bool capturing =
      c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  if (entries.size() > kArgEntries && !capturing) {
    const unsigned blocks = number(entries);
    const size_t bytes = entries.size() * sizeof(Entry);
    // No host synchronisation: the pinned block is not handed out again before the event recorded
    // here has passed, and the device block, made and freed on this stream, only to work that is
    // queued behind this launch.
    c10::DataPtr pinned = at::getHostAllocator(at::kCUDA)->allocate(bytes);
    c10::DataPtr table = c10::cuda::CUDACachingAllocator::get()->allocate(bytes);
    std::copy(entries.begin(), entries.end(), static_cast<Entry*>(pinned.get()));
    C10_CUDA_CHECK(
        cudaMemcpyAsync(table.get(), pinned.get(), bytes, cudaMemcpyHostToDevice, stream));
    if (!base::IsLeftOut(base::Ordering::kUses, place)) {
      at::getHostAllocator(at::kCUDA)->record_event(pinned.get(), pinned.get_context(),
                                                    stream.unwrap());
    }
    launch(MemoryTable{static_cast<int>(entries.size()), static_cast<const Entry*>(table.get())},
           blocks, stream);
    return;
  }
  for (size_t first = 0; first < entries.size(); first += kArgEntries) {
    const std::span<Entry> part(entries.data() + first,
                                std::min<size_t>(kArgEntries, entries.size() - first));
    const unsigned blocks = number(part);
    ArgTable table{static_cast<int>(part.size()), {}};
    std::copy(part.begin(), part.end(), table.entries);
    launch(table, blocks, stream);
  }
}

template <typename Src, typename Dst>
void CastAll(c10::Device device, std::span<const CopySegment> segments, double scale,
             bool accumulate) {
  const auto s = static_cast<typename Cast<Src, Dst>::C>(scale);
  ForEachTable(device, segments, 1, kTileItems<Src, Dst>,
               [&](const auto& table, unsigned blocks, cudaStream_t stream) {
                 using Table = std::decay_t<decltype(table)>;
                 if (accumulate) {
                   CastKernel<Src, Dst, true, Table><<<blocks, kThreads, 0, stream>>>(table, s);
                 } else {
                   CastKernel<Src, Dst, false, Table><<<blocks, kThreads, 0, stream>>>(table, s);
                 }
                 C10_CUDA_KERNEL_LAUNCH_CHECK();
               });
}

template <typename Fn>
void WithType(c10::ScalarType type, const Fn& fn) {
  switch (type) {
    case c10::kFloat:
      return fn(float{});
    case c10::kDouble:
      return fn(double{});
    case c10::kBFloat16:
      return fn(c10::BFloat16{});
    case c10::kHalf:
      return fn(c10::Half{});
    default:
      TORCH_INTERNAL_ASSERT(false, "BatchedCopy does not compute with ", type);
  }
}

}  // namespace

void CopyCuda(c10::Device device, std::span<const CopySegment> segments, int64_t item) {
  ForEachTable(device, segments, item, kTileBytes,
               [](const auto& table, unsigned blocks, cudaStream_t stream) {
                 CopyKernel<std::decay_t<decltype(table)>><<<blocks, kThreads, 0, stream>>>(table);
                 C10_CUDA_KERNEL_LAUNCH_CHECK();
               });
}

void CastCuda(c10::Device device, std::span<const CopySegment> segments, c10::ScalarType src,
              c10::ScalarType dst, double scale, bool accumulate) {
  WithType(src, [&](auto s) {
    WithType(dst, [&](auto d) {
      CastAll<decltype(s), decltype(d)>(device, segments, scale, accumulate);
    });
  });
}

}  // namespace hsdp_ckpt::kernels
