#pragma once

#include <algorithm>
#include <cstdint>

namespace hsdp_ckpt::base {

/// The rows of a dimension that one shard holds: [first, first + count).
struct ShardRows {
  int64_t first = 0;
  int64_t count = 0;

  int64_t end() const { return first + count; }
  friend bool operator==(const ShardRows&, const ShardRows&) = default;
};

/// Rows of a full chunk when `rows` rows are cut into `shards`: ceil(rows / shards). The first
/// shard always has that many. `rows` >= 0, `shards` >= 1.
constexpr int64_t ChunkRows(int64_t rows, int64_t shards) { return (rows + shards - 1) / shards; }

/// Whether all shards have the same number of rows. `shards` >= 1.
constexpr bool CutsEvenly(int64_t rows, int64_t shards) { return rows % shards == 0; }

/// Which of `rows` rows shard number `shard` of `shards` holds, as torch.chunk and DTensor's
/// Shard(0) cut them: ceil(rows / shards) each, the last shard that has any may have fewer, and
/// shards behind it have none (`first` is `rows` then). This is the only place that knows the rule;
/// the wrapper, the save's plan and Python all ask here. `rows` >= 0, `shards` >= 1, `shard` >= 0.
constexpr ShardRows RowsOfShard(int64_t rows, int64_t shards, int64_t shard) {
  const int64_t chunk = ChunkRows(rows, shards);
  const int64_t first = std::min(chunk * shard, rows);
  return {first, std::min(chunk, rows - first)};
}

}  // namespace hsdp_ckpt::base
