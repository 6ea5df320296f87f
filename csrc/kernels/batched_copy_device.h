#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <span>
#include <type_traits>
#include <vector>

#include "kernels/batched_copy.h"

// The kernels of BatchedCopy and the tables that they read, apart from their launches
// (batched_copy_cuda.cu): in the device language, which the tests read with g++, on the simulated
// GPU and under sanitizers.
//
// One launch for all segments. Each segment is cut into tiles, a block moves one tile after
// another, and finds a tile's segment by a binary search over the tiles' running count: blocks stay
// busy whether there are three large segments or thousands of small ones. There are no more blocks
// than the device runs at once.
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
  int64_t tiles;  // of all entries
  Entry entries[kArgEntries];
  __device__ const Entry& operator[](int i) const { return entries[i]; }
};
struct MemoryTable {
  int count;
  int64_t tiles;
  const Entry* entries;
  __device__ const Entry& operator[](int i) const { return entries[i]; }
};

/// What there is to copy of `segments`, whose elements take `item` bytes (1: they are counted).
inline std::vector<Entry> EntriesOf(std::span<const CopySegment> segments, int64_t item) {
  std::vector<Entry> entries;
  entries.reserve(segments.size());
  for (const CopySegment& segment : segments) {
    if (segment.numel == 0) continue;
    entries.push_back({static_cast<const char*>(segment.src), static_cast<char*>(segment.dst),
                       segment.numel * item, 0});
  }
  return entries;
}

/// Counts the tiles of `tile` items up; returns how many there are in all.
inline int64_t NumberTiles(std::span<Entry> entries, int64_t tile) {
  int64_t tiles = 0;
  for (Entry& entry : entries) {
    entry.first_tile = tiles;
    tiles += (entry.numel + tile - 1) / tile;
  }
  return tiles;
}

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

__device__ inline void CopyTile(const Entry& segment, int64_t tile) {
  const int64_t first = (tile - segment.first_tile) * kTileBytes;
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

template <typename Table>
__global__ void __launch_bounds__(kThreads) CopyKernel(const __grid_constant__ Table table) {
  for (int64_t tile = blockIdx.x; tile < table.tiles; tile += gridDim.x) {
    CopyTile(FindSegment(table, tile), tile);
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

template <typename Src, typename Dst, bool kAccumulate>
__device__ void CastTile(const Entry& segment, int64_t tile, typename Cast<Src, Dst>::C scale) {
  // Elements of a vector: 16 bytes on the wider side, so that neighbouring threads touch
  // neighbouring bytes on both.
  constexpr int kItems = kVector / (sizeof(Src) > sizeof(Dst) ? sizeof(Src) : sizeof(Dst));
  using SrcPack = Pack<Src, kItems>;
  using DstPack = Pack<Dst, kItems>;

  const int64_t first = (tile - segment.first_tile) * kTileItems<Src, Dst>;
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

template <typename Src, typename Dst, bool kAccumulate, typename Table>
__global__ void __launch_bounds__(kThreads)
    CastKernel(const __grid_constant__ Table table, typename Cast<Src, Dst>::C scale) {
  for (int64_t tile = blockIdx.x; tile < table.tiles; tile += gridDim.x) {
    CastTile<Src, Dst, kAccumulate>(FindSegment(table, tile), tile, scale);
  }
}

}  // namespace
}  // namespace hsdp_ckpt::kernels
