// The kernels of BatchedCopy, read by g++ under AddressSanitizer and UndefinedBehaviorSanitizer,
// and the CPU's: they leave the same bytes, and touch none beside their segments. Each segment has
// memory of its own on both sides, which ends where the segment does.
#include <gtest/gtest.h>
#include <sanitizer/asan_interface.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/cast_cpu.h"
#include "simgpu/kernels/device_language.h"
// After it: what the device language means.
#include "kernels/batched_copy_device.h"

namespace hsdp_ckpt::kernels {
namespace {

/// Elements that begin `offset` elements behind a multiple of 16 bytes.
template <typename T>
class Memory {
 public:
  Memory(const std::vector<T>& elements, size_t offset)
      : block_(offset * sizeof(T) + elements.size() * sizeof(T), char{0x5a}),
        begin_(offset * sizeof(T)) {
    std::copy_n(reinterpret_cast<const char*>(elements.data()), elements.size() * sizeof(T),
                block_.begin() + static_cast<std::ptrdiff_t>(begin_));
    ASAN_POISON_MEMORY_REGION(block_.data(), Guarded());
  }
  ~Memory() { ASAN_UNPOISON_MEMORY_REGION(block_.data(), Guarded()); }
  Memory(Memory&&) = default;

  T* data() { return reinterpret_cast<T*>(block_.data() + begin_); }
  std::span<T> elements() { return {data(), (block_.size() - begin_) / sizeof(T)}; }
  /// Whether what is in front has stayed, as far as it is too little for the sanitizer.
  bool IsWholeInFront() const {
    const auto begin = block_.begin() + static_cast<std::ptrdiff_t>(Guarded());
    return std::all_of(begin, block_.begin() + static_cast<std::ptrdiff_t>(begin_),
                       [](char c) { return c == char{0x5a}; });
  }

 private:
  size_t Guarded() const { return block_.empty() ? 0 : begin_ / 8 * 8; }

  std::vector<char> block_;
  size_t begin_;
};

/// Random bits, and every fourth element one where casts go wrong: ties, overflow, denormals.
template <typename T>
std::vector<T> Hostile(int64_t n, std::mt19937& random) {
  constexpr double kHard[] = {0.0,     -0.0,       INFINITY,         -INFINITY, NAN,
                              65504.0, 65519.0,    65520.0,          1e-40,     -1e-45,
                              0x1p-25, 0x1.8p-25,  0x1.01p0,         0x1.03p0,  1e300,
                              1e-310,  0x1.ffp127, 0x1.00000100001p0};
  std::vector<T> out(static_cast<size_t>(n));
  std::vector<char> bits(out.size() * sizeof(T));
  std::generate(bits.begin(), bits.end(), [&] { return static_cast<char>(random()); });
  std::copy(bits.begin(), bits.end(), reinterpret_cast<char*>(out.data()));
  if constexpr (sizeof(T) > 1) {
    for (size_t i = random() % 4; i < out.size(); i += 4) {
      out[i] = Narrow<T>(kHard[random() % std::size(kHard)]);
    }
  }
  return out;
}

template <typename T>
bool SameBits(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

/// The segments of one call, with destinations for the kernel and others for the CPU.
template <typename Src, typename Dst>
class Batch {
 public:
  explicit Batch(unsigned seed) : random_(seed) {}

  void Add(int64_t numel, size_t src_offset, size_t dst_offset, bool zeros = false) {
    const std::vector<Dst> before = Hostile<Dst>(numel, random_);
    srcs_.emplace_back(Hostile<Src>(numel, random_), src_offset);
    dsts_.emplace_back(before, dst_offset);
    expected_.emplace_back(before, dst_offset);
    const Src* src = zeros ? nullptr : srcs_.back().data();
    segments_.push_back({src, dsts_.back().data(), numel});
    zeros_.push_back(zeros);
  }
  /// `size` elements at every way in which both sides can lie to words of 16 bytes.
  void AddEveryOffset(int64_t size) {
    for (size_t src = 0; src < kVector / sizeof(Src); ++src) {
      for (size_t dst = 0; dst < kVector / sizeof(Dst); ++dst) {
        Add(size, src, dst, (src + dst) % 7 == 5);
      }
    }
  }

  std::span<const CopySegment> segments() const { return segments_; }

  /// `on_cpu(src, dst, numel)` for every segment, where `src` == nullptr is zeros.
  void Expect(const std::function<void(const Src*, Dst*, int64_t)>& on_cpu, bool computes) {
    for (size_t i = 0; i < segments_.size(); ++i) {
      const int64_t numel = segments_[i].numel;
      const Src* src = zeros_[i] ? nullptr : srcs_[i].data();
      if (numel > 0) on_cpu(src, expected_[i].data(), numel);
      ASSERT_TRUE(dsts_[i].IsWholeInFront()) << "in front of segment " << i;
      for (int64_t at = 0; at < numel; ++at) {
        const Dst got = dsts_[i].data()[at], wanted = expected_[i].data()[at];
        if (SameBits(got, wanted)) continue;
        const bool both_are_nan = computes && got != got && wanted != wanted;
        ASSERT_TRUE(both_are_nan) << "element " << at << " of " << numel << ", segment " << i
                                  << ": " << static_cast<double>(got) << " is not "
                                  << static_cast<double>(wanted);
      }
    }
  }

 private:
  std::mt19937 random_;
  std::vector<Memory<Src>> srcs_;
  std::vector<Memory<Dst>> dsts_, expected_;
  std::vector<CopySegment> segments_;
  std::vector<bool> zeros_;
};

/// `kernel(table)` in every thread of so many blocks as there are tiles, or of a few that take them
/// in turns, with either kind of table.
template <typename Kernel>
void Launch(std::vector<Entry> entries, int64_t tile, bool in_memory, const Kernel& kernel) {
  const int64_t tiles = NumberTiles(entries, tile);
  const auto blocks = static_cast<unsigned>(in_memory ? std::min<int64_t>(tiles, 3) : tiles);
  const std::vector<Entry> exactly(entries.begin(), entries.end());
  const auto count = static_cast<int>(exactly.size());
  if (in_memory) {
    const MemoryTable table{count, tiles, exactly.data()};
    RunGrid(blocks, kThreads, [&] { kernel(table); });
  } else {
    ASSERT_LE(count, kArgEntries);
    const auto table = std::make_unique<ArgTable>();
    table->count = count;
    table->tiles = tiles;
    std::copy(exactly.begin(), exactly.end(), table->entries);
    RunGrid(blocks, kThreads, [&] { kernel(*table); });
  }
}

void CheckCopy(Batch<char, char>& batch, bool in_memory) {
  Launch(EntriesOf(batch.segments(), 1), kTileBytes, in_memory,
         [](const auto& table) { CopyKernel(table); });
  const auto on_cpu = [](const char* src, char* dst, int64_t n) {
    if (src != nullptr) {
      CopyRun(src, dst, n, /*stream=*/true);
    } else {
      std::memset(dst, 0, static_cast<size_t>(n));
    }
  };
  batch.Expect(on_cpu, /*computes=*/false);
}

template <typename Src, typename Dst, bool kAccumulate>
void CheckCast(Batch<Src, Dst>& batch, double scale, bool in_memory) {
  const auto factor = static_cast<typename Cast<Src, Dst>::C>(scale);
  Launch(EntriesOf(batch.segments(), 1), kTileItems<Src, Dst>, in_memory, [&](const auto& table) {
    CastKernel<Src, Dst, kAccumulate, std::decay_t<decltype(table)>>(table, factor);
  });
  const auto on_cpu = [scale](const Src* src, Dst* dst, int64_t n) {
    if (src != nullptr) {
      CastRun<Src, Dst, kAccumulate>(src, dst, n, scale, /*stream=*/!kAccumulate);
    } else if (!kAccumulate) {
      std::fill_n(dst, n, Dst{});
    }
  };
  batch.Expect(on_cpu, /*computes=*/true);
}

/// Both kinds of additions, by one and by another factor.
template <typename Src, typename Dst>
void CheckCasts(const std::function<void(Batch<Src, Dst>&)>& fill, bool in_memory) {
  unsigned seed = 0;
  for (const double scale : {1.0, 1.0 / 3.0}) {
    SCOPED_TRACE(scale);
    Batch<Src, Dst> plain(++seed), accumulated(++seed);
    fill(plain);
    CheckCast<Src, Dst, false>(plain, scale, in_memory);
    fill(accumulated);
    CheckCast<Src, Dst, true>(accumulated, scale, in_memory);
  }
}

constexpr int64_t kSmallSizes[] = {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 257};

/// Around a round of a block, a tile, and several of them.
std::vector<int64_t> LargeSizes(int64_t tile) {
  return {tile / 2 - 1, tile / 2, tile / 2 + 1, tile - 1, tile, tile + 1, 2 * tile + 5};
}

TEST(CopyKernelTest, CopiesAsTheCpuDoes) {
  for (const int64_t size : kSmallSizes) {
    SCOPED_TRACE(size);
    Batch<char, char> batch(1);
    batch.AddEveryOffset(size);
    CheckCopy(batch, /*in_memory=*/true);
  }
  for (const int64_t size : LargeSizes(kTileBytes)) {
    SCOPED_TRACE(size);
    Batch<char, char> batch(2);
    // Sixteen, eight, four, two bytes and one at a time, with and without a head.
    for (const size_t apart : {0, 8, 4, 2, 1}) {
      for (const size_t dst : {0, 5}) batch.Add(size, dst + apart, dst);
    }
    batch.Add(size, 0, 3, /*zeros=*/true);
    CheckCopy(batch, /*in_memory=*/false);
  }
}

TEST(CopyKernelTest, FindsEachOfManySegments) {
  for (const int count : {1, kArgEntries, kArgEntries + 1, 1000}) {
    SCOPED_TRACE(count);
    Batch<char, char> batch(3);
    for (int i = 0; i < count; ++i) batch.Add(i % 9 * 11, i % 16, i / 16 % 16, i % 7 == 5);
    batch.Add(kTileBytes + 1, 1, 2);
    CheckCopy(batch, /*in_memory=*/count >= kArgEntries);
  }
}

template <typename Pair>
class CastKernelTest : public ::testing::Test {};

template <typename Src>
using WithSource = ::testing::Types<std::pair<Src, float>, std::pair<Src, double>,
                                    std::pair<Src, c10::BFloat16>, std::pair<Src, c10::Half>>;

TYPED_TEST_SUITE_P(CastKernelTest);

TYPED_TEST_P(CastKernelTest, ComputesAsTheCpuDoes) {
  using Src = typename TypeParam::first_type;
  using Dst = typename TypeParam::second_type;
  for (const int64_t size : kSmallSizes) {
    SCOPED_TRACE(size);
    CheckCasts<Src, Dst>([&](auto& batch) { batch.AddEveryOffset(size); }, /*in_memory=*/true);
  }
  for (const int64_t size : LargeSizes(kTileItems<Src, Dst>)) {
    SCOPED_TRACE(size);
    const auto fill = [&](auto& batch) {
      batch.Add(size, 0, 0);  // words, then words behind a head, then one by one
      batch.Add(size, 1, 1);
      batch.Add(size, 0, 1);
      batch.Add(size, 0, 1, /*zeros=*/true);
    };
    CheckCasts<Src, Dst>(fill, /*in_memory=*/false);
  }
}

TYPED_TEST_P(CastKernelTest, FindsEachOfManySegments) {
  using Src = typename TypeParam::first_type;
  using Dst = typename TypeParam::second_type;
  const auto fill = [](auto& batch) {
    for (int i = 0; i < 300; ++i) batch.Add(i % 9 * 11, i % 2, i / 2 % 2, i % 7 == 5);
    batch.Add(kTileItems<Src, Dst> + 1, 0, 0);
  };
  CheckCasts<Src, Dst>(fill, /*in_memory=*/true);
}

REGISTER_TYPED_TEST_SUITE_P(CastKernelTest, ComputesAsTheCpuDoes, FindsEachOfManySegments);
INSTANTIATE_TYPED_TEST_SUITE_P(Float, CastKernelTest, WithSource<float>);
INSTANTIATE_TYPED_TEST_SUITE_P(Double, CastKernelTest, WithSource<double>);
INSTANTIATE_TYPED_TEST_SUITE_P(BFloat16, CastKernelTest, WithSource<c10::BFloat16>);
INSTANTIATE_TYPED_TEST_SUITE_P(Half, CastKernelTest, WithSource<c10::Half>);

}  // namespace
}  // namespace hsdp_ckpt::kernels
