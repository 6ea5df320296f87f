#include "snapshot/staging_copy.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <thread>

#include "base/crc32.h"

namespace hsdp_ckpt {
namespace {

/// Sources of odd sizes in one block of memory, and an image with a gap behind each target.
struct Memory {
  explicit Memory(const std::vector<int64_t>& sizes) {
    int64_t total = 0, image = 0;
    for (const int64_t size : sizes) total += size, image += size + 3;
    source.resize(static_cast<size_t>(total));
    target.assign(static_cast<size_t>(image), std::byte{0xee});
    std::mt19937 random(7);
    for (auto& byte : source) byte = static_cast<std::byte>(random());
    int64_t from = 0, to = 0;
    for (const int64_t size : sizes) {
      pieces.push_back({source.data() + from, target.data() + to, size});
      from += size;
      to += size + 3;
    }
  }
  bool Copied() const {
    for (const snapshot::CopyPiece& piece : pieces) {
      if (std::memcmp(piece.source, piece.target, static_cast<size_t>(piece.size)) != 0)
        return false;
      for (int i = 0; i < 3; ++i) {
        if (piece.target[piece.size + i] != std::byte{0xee}) return false;
      }
    }
    return true;
  }
  std::vector<std::byte> source, target;
  std::vector<snapshot::CopyPiece> pieces;
};

const std::vector<int64_t> kSizes = {
    0,  1,       4, 70'001, 3 * snapshot::StagingCopy::kChunk + 5, 0, snapshot::StagingCopy::kChunk,
    12, 999'999, 8};

TEST(StagingCopy, OneThreadCopiesAllAndNothingElse) {
  Memory memory(kSizes);
  snapshot::StagingCopy copy(memory.pieces);
  EXPECT_FALSE(copy.done());
  EXPECT_EQ(copy.bytes(), static_cast<int64_t>(memory.source.size()));
  copy.Finish();
  EXPECT_TRUE(copy.done());
  EXPECT_TRUE(memory.Copied());
}

TEST(StagingCopy, SumsWhatItCopies) {
  Memory memory(kSizes);
  snapshot::StagingCopy copy(memory.pieces);
  std::thread background([&] { copy.Run(); });
  copy.Finish();
  for (const snapshot::CopyPiece& piece : memory.pieces) {
    std::vector<uint32_t> expected;
    for (int64_t at = 0; at < piece.size; at += base::kChecksumBlock) {
      expected.push_back(
          base::Crc32({piece.source + at,
                       static_cast<size_t>(std::min(base::kChecksumBlock, piece.size - at))}));
    }
    if (piece.size == 0) continue;  // has the next one's target
    const auto sums = copy.Checksums(piece.target);
    EXPECT_EQ(std::vector<uint32_t>(sums.begin(), sums.end()), expected) << piece.size;
    EXPECT_TRUE(copy.Checksums(piece.target + 1).empty());
  }
  background.join();
}

TEST(StagingCopy, NothingToCopyIsDone) {
  snapshot::StagingCopy none(std::vector<snapshot::CopyPiece>{});
  EXPECT_TRUE(none.done());
  none.Finish();
  EXPECT_EQ(none.FirstChange(2), -1);
}

// A tensor without elements has no memory.
TEST(StagingCopy, NoBytesNeedNoMemory) {
  Memory memory(kSizes);
  memory.pieces.insert(memory.pieces.begin() + 1, {nullptr, nullptr, 0});
  snapshot::StagingCopy copy(memory.pieces);
  copy.Finish();
  EXPECT_EQ(copy.FirstChange(2), -1);
  EXPECT_TRUE(copy.Checksums(nullptr).empty());
}

TEST(StagingCopy, WhoFinishesHelpsAndSeesEverything) {
  for (int round = 0; round < 20; ++round) {
    Memory memory(kSizes);
    snapshot::StagingCopy copy(memory.pieces);
    std::vector<std::thread> background;
    for (int i = 0; i < 2; ++i) background.emplace_back([&] { copy.Run(); });
    std::thread second([&] {
      copy.Finish();
      EXPECT_TRUE(copy.done());
    });
    copy.Finish();
    EXPECT_TRUE(
        memory.Copied());  // before the other threads are joined: their chunks have come as well
    std::memset(memory.source.data(), 0,
                memory.source.size());  // what a step does: a race if anybody still read
    second.join();
    for (auto& thread : background) thread.join();
  }
}

TEST(StagingCopy, AfterACancelNobodyReadsAnyMore) {
  for (int round = 0; round < 20; ++round) {
    Memory memory(kSizes);
    snapshot::StagingCopy copy(memory.pieces);
    std::thread background([&] { copy.Run(); });
    if (round % 2 == 1) std::this_thread::yield();
    copy.Cancel();
    copy.Cancel();
    copy.Finish();
    EXPECT_TRUE(copy.done());
    std::memset(memory.source.data(), 0, memory.source.size());
    memory.target.assign(memory.target.size(), std::byte{1});
    background.join();
  }
}

TEST(StagingCopy, FindsTheFirstPieceThatHasChanged) {
  Memory memory(kSizes);
  snapshot::StagingCopy copy(memory.pieces);
  copy.Finish();
  EXPECT_EQ(copy.FirstChange(2), -1);
  memory.source.back() ^= std::byte{1};
  EXPECT_EQ(copy.FirstChange(2), static_cast<int64_t>(kSizes.size()) - 1);
  memory.source[1 + 4 + 70'001 + 2 * snapshot::StagingCopy::kChunk] ^= std::byte{1};
  EXPECT_EQ(copy.FirstChange(2), 4);
}

}  // namespace
}  // namespace hsdp_ckpt
