#include "checkpoint/save/save_plan.h"

#include <algorithm>
#include <functional>

#include "base/error.h"
#include "base/shard_rows.h"
#include "checkpoint/save/replica_split.h"
#include "format/tensor_pickle.h"

namespace hsdp_ckpt::checkpoint {
namespace {

// Calls with each coordinate of the sharding dimensions; those of replicating dimensions stay 0.
void ForEachShard(const Sharding& sharding,
                  const std::function<void(const std::vector<int64_t>&)>& call) {
  std::vector<int64_t> at(sharding.mesh_shape.size(), 0);
  for (;;) {
    call(at);
    size_t i = at.size();
    for (; i > 0; --i) {
      if (sharding.shard_dims[i - 1] < 0) continue;
      if (++at[i - 1] < sharding.mesh_shape[i - 1]) break;
      at[i - 1] = 0;
    }
    if (i == 0) return;
  }
}

[[noreturn]] void ThrowNotHeld(const PlannedTensor& tensor, const PlannedChunk& shard) {
  std::string where;
  for (const int64_t offset : shard.offsets)
    where += (where.empty() ? "" : ", ") + std::to_string(offset);
  throw base::Error(
      tensor.fqn + ": no rank of the saving process group holds its shard at [" + where +
      "]; save through a group that has every shard, such as one shard group or all ranks");
}

}  // namespace

SavePlan::SavePlan(std::vector<Sharding> shardings, std::vector<PlannedTensor> tensors)
    : shardings_(std::move(shardings)),
      tensors_(std::move(tensors)),
      of_sharding_(shardings_.size()) {
  for (size_t i = 0; i < tensors_.size(); ++i) of_sharding_.at(tensors_[i].sharding).push_back(i);
  for (size_t i = 0; i < shardings_.size(); ++i) {
    if (of_sharding_[i].empty()) continue;
    const Sharding& sharding = shardings_[i];
    if (sharding.shard_dims.size() != sharding.mesh_shape.size() ||
        Product(sharding.mesh_shape) != static_cast<int64_t>(sharding.ranks.size())) {
      throw base::Error("a mesh whose shape, ranks and placements do not fit together");
    }
    ForEachShard(sharding, [&](const Coordinates& at) {
      if (!Holders(sharding, at).empty()) return;
      PlannedChunk box;
      for (const size_t index : of_sharding_[i]) {
        Box(index, at, &box);
        if (Product(box.sizes) > 0) ThrowNotHeld(tensors_[index], box);
      }
    });
  }
}

// Left to right over the mesh's dimensions, each cut by RowsOfShard's rule.
void SavePlan::Box(size_t index, const Coordinates& at, PlannedChunk* box) const {
  const PlannedTensor& tensor = tensors_[index];
  const Sharding& sharding = shardings_[tensor.sharding];
  box->tensor = index;
  box->offsets.assign(tensor.size->size(), 0);
  box->sizes = *tensor.size;
  for (size_t i = 0; i < at.size(); ++i) {
    if (sharding.shard_dims[i] < 0) continue;
    const auto dim = static_cast<size_t>(sharding.shard_dims[i]);
    if (dim >= box->sizes.size())
      throw base::Error(tensor.fqn + ": sharded along a dimension that it does not have");
    int64_t& size = box->sizes[dim];
    const base::ShardRows rows = base::RowsOfShard(size, sharding.mesh_shape[i], at[i]);
    box->offsets[dim] += rows.first;
    size = rows.count;
  }
}

// The ranks of the saving group with these shard coordinates, in mesh order.
std::vector<int64_t> SavePlan::Holders(const Sharding& sharding, const Coordinates& at) const {
  std::vector<int64_t> holders;
  Coordinates each = at;
  for (;;) {
    int64_t flat = 0;
    for (size_t i = 0; i < each.size(); ++i) flat = flat * sharding.mesh_shape[i] + each[i];
    if (const int64_t rank = sharding.ranks[static_cast<size_t>(flat)]; rank >= 0)
      holders.push_back(rank);
    size_t i = each.size();
    for (; i > 0; --i) {
      if (sharding.shard_dims[i - 1] >= 0) continue;
      if (++each[i - 1] < sharding.mesh_shape[i - 1]) break;
      each[i - 1] = 0;
    }
    if (i == 0) return holders;
  }
}

// What each of a shard's holders writes of the tensors of one sharding.
std::vector<ChunkList> SavePlan::Split(size_t sharding, const Coordinates& at,
                                       size_t holders) const {
  const std::vector<size_t>& tensors = of_sharding_[sharding];
  const auto bytes_of = [&](const PlannedChunk& box) {
    return format::TensorBytes(*tensors_[box.tensor].dtype, box.sizes);
  };
  PlannedChunk box;
  int64_t total = 0;
  for (const size_t index : tensors) {
    Box(index, at, &box);
    total += bytes_of(box);
  }
  const bool first_shard = std::all_of(at.begin(), at.end(), [](int64_t c) { return c == 0; });
  const Cutting cutting = shardings_[sharding].whole ? Cutting::kWhole : Cutting::kByRows;
  ReplicaSplit split(total, holders);
  for (const size_t index : tensors) {
    Box(index, at, &box);
    if (bytes_of(box) > 0) {
      split.Add(box, tensors_[index].dtype->size, cutting);
    } else if (first_shard && Product(*tensors_[index].size) == 0) {
      // Other shards' empty parts say nothing; a tensor without elements has one chunk, so that it
      // is in the checkpoint.
      split.AddEmpty(box);
    }
  }
  return std::move(split).TakeChunks();
}

std::optional<SavePlan::Coordinates> SavePlan::CoordinatesOf(const Sharding& sharding,
                                                             int64_t rank) {
  const auto found = std::find(sharding.ranks.begin(), sharding.ranks.end(), rank);
  if (found == sharding.ranks.end()) return std::nullopt;
  Coordinates at(sharding.mesh_shape.size());
  auto flat = static_cast<int64_t>(found - sharding.ranks.begin());
  for (size_t dim = at.size(); dim > 0; --dim) {
    // Replicas share the coordinates of their shard.
    at[dim - 1] = sharding.shard_dims[dim - 1] < 0 ? 0 : flat % sharding.mesh_shape[dim - 1];
    flat /= sharding.mesh_shape[dim - 1];
  }
  return at;
}

ChunkList SavePlan::ChunksOf(int64_t rank) const {
  ChunkList chunks;
  for (size_t i = 0; i < shardings_.size(); ++i) {
    const auto at = of_sharding_[i].empty() ? std::nullopt : CoordinatesOf(shardings_[i], rank);
    if (!at) continue;
    const auto holders = Holders(shardings_[i], *at);
    const auto place =
        static_cast<size_t>(std::find(holders.begin(), holders.end(), rank) - holders.begin());
    chunks.Append(Split(i, *at, holders.size())[place]);
  }
  return chunks;
}

ChunkList SavePlan::LocalShards(int64_t rank) const {
  ChunkList shards;
  PlannedChunk box;
  for (size_t i = 0; i < shardings_.size(); ++i) {
    const auto at = CoordinatesOf(shardings_[i], rank);
    if (!at) continue;
    for (const size_t index : of_sharding_[i]) {
      Box(index, *at, &box);
      shards.Add(index, box.offsets, box.sizes);
    }
  }
  return shards;
}

format::Shape SavePlan::ShardOffsets(int64_t rank, size_t tensor) const {
  const PlannedTensor& planned = tensors_.at(tensor);
  const auto at = CoordinatesOf(shardings_[planned.sharding], rank);
  if (!at) throw base::Error(planned.fqn + ": rank " + std::to_string(rank) + " has no shard");
  PlannedChunk box;
  Box(tensor, *at, &box);
  return box.offsets;
}

std::vector<PlannedFile> SavePlan::Layout(const ChunkList& chunks,
                                          const std::vector<int64_t>& objects,
                                          bool single_file) const {
  RecordSizes sizes;
  FileLayout layout(tensors_, single_file, sizes);
  std::vector<PlannedFile> files;
  const auto take = [&](const PlannedRecord& record) {
    files.resize(layout.files());
    if (files.back().records.empty() && single_file)
      files.back().records.reserve(objects.size() + chunks.size());
    files.back().records.push_back(record);
    files.back().size = layout.size();
  };
  for (const int64_t size : objects) take(layout.AddObject(size));
  for (const PlannedChunk& chunk : chunks) {
    take(layout.AddChunk(chunk));
    files.back().records.back().owner =
        format::RecordOwner(tensors_[chunk.tensor].fqn, chunk.offsets);
  }
  return files;
}

std::vector<ChunkList> SavePlan::ChunksByRank(size_t ranks) const {
  std::vector<ChunkList> by_rank(ranks);
  for (size_t i = 0; i < shardings_.size(); ++i) {
    if (of_sharding_[i].empty()) continue;
    ForEachShard(shardings_[i], [&](const Coordinates& at) {
      const auto holders = Holders(shardings_[i], at);
      if (holders.empty()) return;  // the constructor has seen that there is nothing to write
      const auto parts = Split(i, at, holders.size());
      for (size_t r = 0; r < holders.size(); ++r)
        by_rank.at(static_cast<size_t>(holders[r])).Append(parts[r]);
    });
  }
  return by_rank;
}

}  // namespace hsdp_ckpt::checkpoint
