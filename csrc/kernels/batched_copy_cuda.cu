#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/Allocator.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels/batched_copy.h"

// One launch for all segments. Each segment is cut into tiles, a block moves one tile, and finds
// its segment by a binary search over the tiles' running count: blocks stay busy whether there are
// three large segments or thousands of small ones.
namespace hsdp_ckpt::kernels {
namespace {

constexpr int kThreads = 256;
// 16-byte vectors that a thread has in flight: with 8 blocks on a multiprocessor some 128 KiB,
// enough for HBM3's latency.
constexpr int kInFlight = 4;
constexpr int64_t kVector = 16;
// A tile's bytes on its wider side: two rounds of a block.
constexpr int64_t kTileBytes = 2 * kInFlight * kThreads * kVector;

/// A segment as the kernel sees it; for a copy of bits `numel` counts bytes.
struct Entry {
  const char* src;
  char* dst;
  int64_t numel;
  int64_t first_tile;
};

// What fits with some room into the 4 KiB of arguments that every CUDA version allows.
constexpr int kArgEntries = 120;
struct ArgTable {
  int count;
  Entry entries[kArgEntries];
  __device__ const Entry& operator[](int i) const { return entries[i]; }
};
struct MemoryTable {
  int count;
  const Entry* entries;
  __device__ const Entry& operator[](int i) const { return entries[i]; }
};

template <typename Table>
__device__ const Entry& FindSegment(const Table& table, int64_t tile) {
  int low = 0, high = table.count - 1;
  while (low < high) {  // the last entry whose first tile is not after `tile`
    const int middle = (low + high + 1) / 2;
    if (table[middle].first_tile <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return table[low];
}

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T item[kCount];
};

/// `n` words of type W from aligned `src` to aligned `dst`, all loads of a round before its stores.
template <typename W>
__device__ void CopyWords(const char* src, char* dst, int64_t n) {
  const auto* from = reinterpret_cast<const W*>(src);
  auto* to = reinterpret_cast<W*>(dst);
  for (int64_t base = threadIdx.x; base < n; base += kInFlight * kThreads) {
    W words[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (base + k * kThreads < n) words[k] = from == nullptr ? W{} : from[base + k * kThreads];
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (base + k * kThreads < n) to[base + k * kThreads] = words[k];
    }
  }
}

/// `bytes` bytes as a head up to `dst`'s alignment, words, and a tail.
template <typename W>
__device__ void CopyBytes(const char* src, char* dst, int64_t bytes) {
  constexpr int64_t kWord = sizeof(W);
  const int64_t to_aligned =
      (kWord - static_cast<int64_t>(reinterpret_cast<uintptr_t>(dst) % kWord)) % kWord;
  const int64_t head = to_aligned < bytes ? to_aligned : bytes;
  const int64_t words = (bytes - head) / kWord;
  CopyWords<W>(src == nullptr ? nullptr : src + head, dst + head, words);
  const int64_t body_end = head + words * kWord;
  const int64_t rest = bytes - words * kWord;  // head and tail: fewer than two words
  for (int64_t i = threadIdx.x; i < rest; i += kThreads) {
    const int64_t at = i < head ? i : body_end + i - head;
    dst[at] = src == nullptr ? char{0} : src[at];
  }
}

template <typename Table>
__global__ void __launch_bounds__(kThreads) CopyKernel(const __grid_constant__ Table table) {
  const Entry& segment = FindSegment(table, blockIdx.x);
  const int64_t first = (blockIdx.x - segment.first_tile) * kTileBytes;
  const int64_t bytes = segment.numel - first < kTileBytes ? segment.numel - first : kTileBytes;
  const char* src = segment.src == nullptr ? nullptr : segment.src + first;
  char* dst = segment.dst + first;
  // The widest word at which both sides can be aligned at once.
  const uintptr_t apart =
      src == nullptr ? 0 : reinterpret_cast<uintptr_t>(src) - reinterpret_cast<uintptr_t>(dst);
  if (apart % 16 == 0) {
    CopyBytes<uint4>(src, dst, bytes);
  } else if (apart % 8 == 0) {
    CopyBytes<uint2>(src, dst, bytes);
  } else if (apart % 4 == 0) {
    CopyBytes<uint32_t>(src, dst, bytes);
  } else if (apart % 2 == 0) {
    CopyBytes<uint16_t>(src, dst, bytes);
  } else {
    CopyBytes<uint8_t>(src, dst, bytes);
  }
}

template <typename C>
__device__ C MulAdd(C x, C scale, C sum, bool accumulate);
// Two roundings, never fused: the CPU's numbers, and ATen's.
template <>
__device__ float MulAdd(float x, float scale, float sum, bool accumulate) {
  const float product = __fmul_rn(x, scale);
  return accumulate ? __fadd_rn(product, sum) : product;
}
template <>
__device__ double MulAdd(double x, double scale, double sum, bool accumulate) {
  const double product = __dmul_rn(x, scale);
  return accumulate ? __dadd_rn(product, sum) : product;
}

template <typename Src, typename Dst>
struct Cast {
  using C =
      std::conditional_t<std::is_same_v<Src, double> || std::is_same_v<Dst, double>, double, float>;

  template <bool kAccumulate>
  static __device__ Dst One(Src x, Dst sum, C scale) {
    const C y =
        MulAdd<C>(static_cast<C>(x), scale, kAccumulate ? static_cast<C>(sum) : C{0}, kAccumulate);
    if constexpr (std::is_floating_point_v<Dst>) {
      return static_cast<Dst>(y);
    } else {
      return static_cast<Dst>(
          static_cast<float>(y));  // from float64 by way of float32, as ATen casts
    }
  }
};

/// `n` elements one by one; `src` == nullptr is zeros.
template <typename Src, typename Dst, bool kAccumulate>
__device__ void CastItems(const Src* src, Dst* dst, int64_t n, typename Cast<Src, Dst>::C scale) {
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    dst[i] = src == nullptr ? Dst{}
                            : Cast<Src, Dst>::template One<kAccumulate>(
                                  src[i], kAccumulate ? dst[i] : Dst{}, scale);
  }
}

// Elements of a tile: kTileBytes on the wider side.
template <typename Src, typename Dst>
constexpr int64_t kTileItems = kTileBytes / (sizeof(Src) > sizeof(Dst) ? sizeof(Src) : sizeof(Dst));

template <typename Src, typename Dst, bool kAccumulate, typename Table>
__global__ void __launch_bounds__(kThreads)
    CastKernel(const __grid_constant__ Table table, typename Cast<Src, Dst>::C scale) {
  // Elements of a vector: 16 bytes on the wider side, so that neighbouring threads touch
  // neighbouring bytes on both.
  constexpr int kItems = kVector / (sizeof(Src) > sizeof(Dst) ? sizeof(Src) : sizeof(Dst));
  using SrcPack = Pack<Src, kItems>;
  using DstPack = Pack<Dst, kItems>;

  const Entry& segment = FindSegment(table, blockIdx.x);
  const int64_t first = (blockIdx.x - segment.first_tile) * kTileItems<Src, Dst>;
  int64_t n =
      segment.numel - first < kTileItems<Src, Dst> ? segment.numel - first : kTileItems<Src, Dst>;
  auto* dst = reinterpret_cast<Dst*>(segment.dst) + first;
  if (segment.src == nullptr) {
    if (!kAccumulate)
      CopyBytes<uint4>(nullptr, reinterpret_cast<char*>(dst),
                       n * static_cast<int64_t>(sizeof(Dst)));
    return;
  }
  const auto* src = reinterpret_cast<const Src*>(segment.src) + first;

  const auto misaligned =
      static_cast<int64_t>(reinterpret_cast<uintptr_t>(dst) % sizeof(DstPack) / sizeof(Dst));
  const int64_t to_aligned = (kItems - misaligned) % kItems;
  const int64_t head = to_aligned < n ? to_aligned : n;
  if (reinterpret_cast<uintptr_t>(src + head) % sizeof(SrcPack) != 0) {
    CastItems<Src, Dst, kAccumulate>(src, dst, n, scale);  // never aligned at once
    return;
  }
  CastItems<Src, Dst, kAccumulate>(src, dst, head, scale);
  src += head;
  dst += head;
  n -= head;
  const int64_t packs = n / kItems;
  const auto* from = reinterpret_cast<const SrcPack*>(src);
  auto* to = reinterpret_cast<DstPack*>(dst);
  for (int64_t base = threadIdx.x; base < packs; base += kInFlight * kThreads) {
    SrcPack in[kInFlight];
    DstPack out[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (base + k * kThreads < packs) {
        in[k] = from[base + k * kThreads];
        if constexpr (kAccumulate) out[k] = to[base + k * kThreads];
      }
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (base + k * kThreads < packs) {
#pragma unroll
        for (int j = 0; j < kItems; ++j) {
          out[k].item[j] =
              Cast<Src, Dst>::template One<kAccumulate>(in[k].item[j], out[k].item[j], scale);
        }
        to[base + k * kThreads] = out[k];
      }
    }
  }
  CastItems<Src, Dst, kAccumulate>(src + packs * kItems, dst + packs * kItems, n - packs * kItems,
                                   scale);
}

/// Calls `launch(table, blocks, stream)` for all segments: once, with the table as an argument or,
/// where it is too long for that, in device memory. A captured graph would replay a table that is
/// long gone, so there it is several launches.
template <typename Launch>
void ForEachTable(c10::Device device, std::span<const CopySegment> segments, int64_t item,
                  int64_t tile, const Launch& launch) {
  const c10::cuda::CUDAGuard guard(device);
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
    at::getHostAllocator(at::kCUDA)->record_event(pinned.get(), pinned.get_context(),
                                                  stream.unwrap());
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
