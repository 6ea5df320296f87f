#include "hsdp/shard_layout.h"

#include <stdexcept>
#include <utility>

namespace hsdp_ckpt::hsdp {

std::vector<int64_t> CutSizes::WithRows(int64_t rows) const {
  std::vector<int64_t> shard = sizes;
  if (is_cut()) shard.at(static_cast<size_t>(dim)) = rows;
  return shard;
}

ParamShape ParamShape::Of(const CutSizes& param, int64_t shards, int64_t item) {
  if (!param.is_cut()) return {shards, item};
  const auto dims = static_cast<int64_t>(param.sizes.size());
  if (param.dim < 0 || param.dim >= dims)
    throw std::invalid_argument("ParamShape: there is no such dimension to cut");
  ParamShape shape{0, item, 1};
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t size = param.sizes[static_cast<size_t>(d)];
    if (d == param.dim) {
      shape.rows = size;
      continue;
    }
    shape.row_size *= size;
    if (d < param.dim) shape.runs *= size;
  }
  if (param.dim > 0 && shards > 0 && !base::CutsEvenly(shape.rows, shards))
    throw std::invalid_argument("ParamShape: a dimension behind the first is cut evenly");
  // One shard is the whole parameter, and lies in one piece.
  if (shards == 1 || shape.runs == 0) shape.runs = 1;
  return shape;
}

ShardPlace ShardPlace::Of(const ParamShape& param, int64_t shards, int64_t rank) {
  const int64_t piece = param.row_size / param.runs;  // of one row
  const base::ShardRows own = base::RowsOfShard(param.rows, shards, rank);
  return {own.first * piece, own.count * piece, param.runs, param.rows * piece};
}

ShardLayout::ShardLayout(std::vector<ParamShape> params, int64_t shards, int64_t alignment,
                         const std::vector<size_t>& order)
    : params_(std::move(params)), shards_(shards), offsets_(params_.size()) {
  if (shards < 1) throw std::invalid_argument("ShardLayout: a shard group has at least one rank");
  if (alignment < 1) throw std::invalid_argument("ShardLayout: alignment is at least one element");
  for (size_t place = 0; place < params_.size(); ++place) {
    const size_t i = order.empty() ? place : order.at(place);
    if (params_[i].rows < 0 || params_[i].row_size < 0)
      throw std::invalid_argument("ShardLayout: a negative size");
    offsets_[i] = flat_numel_;
    const int64_t padded = chunk_rows(i) * params_[i].row_size;
    flat_numel_ += (padded + alignment - 1) / alignment * alignment;
  }
}

int64_t ShardLayout::chunk_rows(size_t i) const {
  return base::ChunkRows(params_.at(i).rows, shards_);
}

base::ShardRows ShardLayout::rows(size_t i, int64_t rank) const {
  return base::RowsOfShard(params_.at(i).rows, shards_, rank);
}

int64_t ShardLayout::shard_numel(size_t i, int64_t rank) const {
  return shard_rows(i, rank) * params_.at(i).row_size;
}

}  // namespace hsdp_ckpt::hsdp
