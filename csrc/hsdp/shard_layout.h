#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/shard_rows.h"

namespace hsdp_ckpt::hsdp {

/// What is cut of a parameter among the ranks of a shard group: dimension `dim` of `sizes`. A
/// parameter without dimensions can't be cut: every rank has the whole value.
struct CutSizes {
  std::vector<int64_t> sizes;
  int64_t dim = 0;

  bool is_cut() const { return !sizes.empty(); }
  /// The sizes of a shard of `rows` indices along the dimension.
  std::vector<int64_t> WithRows(int64_t rows) const;
};

/// One parameter as its shards see it. A row is what one index along the dimension that is cut
/// selects; base::RowsOfShard says which rows a shard holds.
struct ParamShape {
  /// `item` is what one element of the parameter counts as, in elements or bytes. A parameter
  /// without dimensions counts as one row a rank, each of them the whole value. Throws
  /// std::invalid_argument for a dimension that there isn't, and for one behind the first that does
  /// not divide evenly among `shards`: as torch does.
  static ParamShape Of(const CutSizes& param, int64_t shards, int64_t item = 1);

  int64_t rows = 0;      ///< size of the dimension that is cut
  int64_t row_size = 0;  ///< elements in one row
  int64_t runs = 1;      ///< so many pieces of a row lie apart: the product of the sizes before it

  int64_t numel() const { return rows * row_size; }
};

/// Where a rank's shard lies in the whole parameter: `runs` runs of `run` elements, the first one
/// at `first` and every next one `stride` behind. In the shard they follow each other.
struct ShardPlace {
  int64_t first, run, runs, stride;

  static ShardPlace Of(const ParamShape& param, int64_t shards, int64_t rank);
};

/// The layout of a unit's parameters over the ranks of a shard group, in elements of one dtype.
///
/// Flat shard buffer: the shards of one rank one after the other, each padded to `chunk_rows` rows
/// and then to `alignment` elements, so that every rank's buffer has the same size and a collective
/// can move it as it is. A packed unsharded buffer is the `shards` flat buffers one after the
/// other, by rank.
class ShardLayout {
 public:
  /// `alignment` in elements; `shards` >= 1. `order`: the parameters' indices as they follow each
  /// other in memory; empty: as they are given. Throws std::invalid_argument on a negative size or
  /// a `shards` below one.
  ShardLayout(std::vector<ParamShape> params, int64_t shards, int64_t alignment,
              const std::vector<size_t>& order = {});

  int64_t shards() const { return shards_; }
  size_t size() const { return params_.size(); }
  const ParamShape& param(size_t i) const { return params_.at(i); }

  /// Rows of every full chunk of parameter `i`: ceil(rows / shards).
  int64_t chunk_rows(size_t i) const;
  /// The rows of parameter `i` that `rank` holds; none is possible.
  base::ShardRows rows(size_t i, int64_t rank) const;
  /// First row that `rank` holds, clipped to the number of rows.
  int64_t first_row(size_t i, int64_t rank) const { return rows(i, rank).first; }
  /// Rows that `rank` holds; may be 0.
  int64_t shard_rows(size_t i, int64_t rank) const { return rows(i, rank).count; }
  ShardPlace place(size_t i, int64_t rank) const {
    return ShardPlace::Of(params_.at(i), shards_, rank);
  }
  /// Elements that `rank` holds.
  int64_t shard_numel(size_t i, int64_t rank) const;
  /// Where parameter `i` begins in every rank's flat buffer, in elements.
  int64_t offset(size_t i) const { return offsets_.at(i); }
  /// Elements of one rank's flat buffer, padding included; the same on all ranks.
  int64_t flat_numel() const { return flat_numel_; }

 private:
  std::vector<ParamShape> params_;
  int64_t shards_;
  std::vector<int64_t> offsets_;
  int64_t flat_numel_ = 0;
};

}  // namespace hsdp_ckpt::hsdp
