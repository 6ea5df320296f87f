#include "base/shard_rows.h"

#include <gtest/gtest.h>

#include <vector>

namespace hsdp_ckpt::base {
namespace {

// As torch.chunk does it: full chunks until the rows run out.
std::vector<ShardRows> Reference(int64_t rows, int64_t shards) {
  std::vector<ShardRows> all;
  int64_t chunk = 0;
  while (chunk * shards < rows) ++chunk;
  for (int64_t shard = 0, row = 0; shard < shards; ++shard) {
    ShardRows own{row, 0};
    for (; row < rows && own.count < chunk; ++row) ++own.count;
    all.push_back(own);
  }
  return all;
}

TEST(ShardRows, EveryRowHasOneShardInOrder) {
  for (int64_t rows = 0; rows <= 40; ++rows) {
    for (int64_t shards = 1; shards <= 17; ++shards) {
      const std::vector<ShardRows> expected = Reference(rows, shards);
      int64_t next = 0;
      for (int64_t shard = 0; shard < shards; ++shard) {
        const ShardRows own = RowsOfShard(rows, shards, shard);
        EXPECT_EQ(own, expected[static_cast<size_t>(shard)])
            << rows << " " << shards << " " << shard;
        EXPECT_EQ(own.first, next);
        EXPECT_LE(own.count, ChunkRows(rows, shards));
        next = own.end();
      }
      EXPECT_EQ(next, rows);
    }
  }
}

TEST(ShardRows, TheFirstShardHasAFullChunk) {
  for (int64_t rows = 0; rows <= 40; ++rows) {
    for (int64_t shards = 1; shards <= 17; ++shards) {
      EXPECT_EQ(RowsOfShard(rows, shards, 0).count, ChunkRows(rows, shards));
    }
  }
}

TEST(ShardRows, AnEvenCutGivesAllShardsTheSame) {
  for (int64_t rows = 0; rows <= 40; ++rows) {
    for (int64_t shards = 1; shards <= 17; ++shards) {
      const std::vector<ShardRows> all = Reference(rows, shards);
      EXPECT_EQ(CutsEvenly(rows, shards), all.front().count == all.back().count);
    }
  }
}

TEST(ShardRows, ShardsBehindTheLastRowAreEmpty) {
  constexpr int64_t kLarge = int64_t{1} << 40;
  EXPECT_EQ(RowsOfShard(5, 4, 3), (ShardRows{5, 0}));
  EXPECT_EQ(RowsOfShard(1, 1024, 1023), (ShardRows{1, 0}));
  EXPECT_EQ(RowsOfShard(kLarge + 1, 1024, 1023).end(), kLarge + 1);
}

}  // namespace
}  // namespace hsdp_ckpt::base
