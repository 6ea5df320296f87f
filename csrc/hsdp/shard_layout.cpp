#include "hsdp/shard_layout.h"

#include <stdexcept>
#include <utility>

namespace hsdp_ckpt::hsdp {

ParamShape ParamShape::Of(const std::vector<int64_t>& sizes, int64_t shards, int64_t item) {
  if (sizes.empty()) return {shards, item};
  for (size_t d = 1; d < sizes.size(); ++d) item *= sizes[d];
  return {sizes[0], item};
}

std::vector<int64_t> ShardSizes(std::vector<int64_t> sizes, int64_t rows) {
  if (!sizes.empty()) sizes[0] = rows;
  return sizes;
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
