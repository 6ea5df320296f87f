#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/Allocator.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <source_location>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/left_out.h"
#include "kernels/batched_copy.h"
#include "kernels/batched_copy_device.h"

namespace hsdp_ckpt::kernels {
namespace {

/// How many blocks of `kernel` the device, which is the current one, runs at once: its registers
/// decide. Asked once for each kernel and device.
int64_t BlocksAtOnce(const void* kernel, c10::DeviceIndex device) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, c10::DeviceIndex>, int64_t> known;
  const std::lock_guard lock(mutex);
  const auto at = known.find({kernel, device});
  if (at != known.end()) return at->second;
  int on_each = 0, multiprocessors = 0;
  C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&on_each, kernel, kThreads, 0));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return known[{kernel, device}] = int64_t{on_each} * multiprocessors;
}

/// `kernel(table, scale...)` for all tiles of the table.
template <typename Table, typename... Scale>
void LaunchTiles(void (*kernel)(Table, Scale...), const Table& table,
                 const c10::cuda::CUDAStream& stream, Scale... scale) {
  const int64_t at_once =
      BlocksAtOnce(reinterpret_cast<const void*>(kernel), stream.device_index());
  const auto blocks = static_cast<unsigned>(std::min(table.tiles, at_once));
  kernel<<<blocks, kThreads, 0, stream>>>(table, scale...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

/// Calls `launch(table, stream)` for all segments: once, with the table as an argument or,
/// where it is too long for that, in device memory. A captured graph would replay a table that is
/// long gone, so there it is several launches.
template <typename Launch>
void ForEachTable(c10::Device device, std::span<const CopySegment> segments, int64_t item,
                  int64_t tile, const Launch& launch) {
  const auto place = std::source_location::current();
  c10::cuda::OptionalCUDAGuard guard;
  if (!base::IsLeftOut(base::Ordering::kWithin, place)) guard.set_device(device);
  const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
  std::vector<Entry> entries = EntriesOf(segments, item);
  const bool capturing =
      c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  if (entries.size() > kArgEntries && !capturing) {
    const int64_t tiles = NumberTiles(entries, tile);
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
    launch(MemoryTable{static_cast<int>(entries.size()), tiles,
                       static_cast<const Entry*>(table.get())},
           stream);
    return;
  }
  for (size_t first = 0; first < entries.size(); first += kArgEntries) {
    const std::span<Entry> part(entries.data() + first,
                                std::min<size_t>(kArgEntries, entries.size() - first));
    ArgTable table{static_cast<int>(part.size()), NumberTiles(part, tile), {}};
    std::copy(part.begin(), part.end(), table.entries);
    launch(table, stream);
  }
}

template <typename Src, typename Dst>
void CastAll(c10::Device device, std::span<const CopySegment> segments, double scale,
             bool accumulate) {
  const auto s = static_cast<typename Cast<Src, Dst>::C>(scale);
  ForEachTable(device, segments, 1, kTileItems<Src, Dst>,
               [&](const auto& table, const c10::cuda::CUDAStream& stream) {
                 using Table = std::decay_t<decltype(table)>;
                 LaunchTiles(accumulate ? CastKernel<Src, Dst, true, Table>
                                        : CastKernel<Src, Dst, false, Table>,
                             table, stream, s);
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
               [](const auto& table, const c10::cuda::CUDAStream& stream) {
                 LaunchTiles(CopyKernel<std::decay_t<decltype(table)>>, table, stream);
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
