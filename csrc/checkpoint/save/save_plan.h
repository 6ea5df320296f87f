#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/save/chunk_list.h"
#include "checkpoint/save/file_layout.h"
#include "checkpoint/save/planned_tensor.h"
#include "format/data_file_name.h"
#include "format/metadata.h"

namespace hsdp_ckpt::checkpoint {

/// How tensors lie over the ranks of a save: a device mesh and a placement for each of its
/// dimensions.
struct Sharding {
  std::vector<int64_t> mesh_shape;
  std::vector<int64_t> ranks;  ///< of the mesh, row-major: the rank in the saving process group, -1
                               ///< if it is not there
  std::vector<int64_t>
      shard_dims;  ///< one a mesh dimension: the tensor dimension it cuts, -1 where it replicates
  bool whole = false;  ///< nothing says that replicas hold equal values: no tensor is put together
                       ///< from two of them
};

/// For each tensor, then for each object, the way to its value in the nested state dict. A name is
/// the parts of its path, joined by dots, so these are kept as their lengths in it.
struct PlannedPaths {
  struct Part {
    uint32_t bytes = 0;
    bool is_index = false;  ///< of a list; else a key
  };
  std::vector<Part> parts;
  std::vector<uint32_t> counts;  ///< of the parts of each path
};

/// Who writes what, from shapes, meshes and placements alone: every rank computes its own part, the
/// coordinator all of it, and nobody has to be asked.
///
/// The tensors that one set of ranks holds alike (a shard and its replicas in the saving group) are
/// laid end to end in the order given, and each of the R holders takes a contiguous 1/R of the
/// bytes. Only tensors that straddle are cut, at a row of the first dimension longer than 1, or
/// further inside where one row is more than kCutGrain; those of a `whole` sharding go to the
/// holder that would have had the larger part. Immutable; thread-safe.
class SavePlan {
 public:
  /// Throws Error, naming a tensor, for a shard that no rank of the saving group holds.
  SavePlan(std::vector<Sharding> shardings, std::vector<PlannedTensor> tensors);

  const std::vector<PlannedTensor>& tensors() const { return tensors_; }
  /// What `rank` writes, in the order of its records. Takes time in proportion to the tensors, not
  /// to the ranks.
  ChunkList ChunksOf(int64_t rank) const;
  /// The local shards on `rank` of the tensors whose mesh has it.
  ChunkList LocalShards(int64_t rank) const;
  /// Where the local shard on `rank` begins in the whole tensor. Throws Error for a tensor whose
  /// mesh does not have it.
  format::Shape ShardOffsets(int64_t rank, size_t tensor) const;
  /// A rank's data files: `objects` are the sizes in bytes of the objects before the tensors; one
  /// file, or one a record.
  std::vector<PlannedFile> Layout(const ChunkList& chunks, const std::vector<int64_t>& objects,
                                  bool single_file) const;

  struct Writer {
    format::ProcessIdentity owner;
    std::vector<std::pair<std::string, int64_t>>
        objects;  ///< fqn and size in bytes of what it writes before its tensors
  };
  /// What of a save its plan does not know.
  struct EncodeRequest {
    std::span<const Writer> writers;  ///< one a rank of the saving group
    uint64_t save_id = 0;
    bool single_file = true;
    const PlannedPaths* paths = nullptr;  ///< null for a state dict that is not flattened
    std::optional<format::StorageMeta> storage_meta{};
    std::optional<std::string> version{};
  };
  struct Encoded {
    std::string metadata;                                ///< the whole `.metadata` file
    std::vector<std::pair<std::string, int64_t>> files;  ///< every rank's, and their sizes
  };
  /// The metadata of the whole save: tensors in the plan's order, then the writers' objects. Throws
  /// as MetadataEncoder does.
  Encoded Encode(const EncodeRequest& request) const;

 private:
  using Coordinates = std::vector<int64_t>;

  static std::optional<Coordinates> CoordinatesOf(const Sharding& sharding, int64_t rank);
  /// A tensor's shard; `box` is reused, since there are millions in a large job.
  void Box(size_t tensor, const Coordinates& at, PlannedChunk* box) const;
  std::vector<int64_t> Holders(const Sharding& sharding, const Coordinates& at) const;
  std::vector<ChunkList> Split(size_t sharding, const Coordinates& at, size_t holders) const;
  std::vector<ChunkList> ChunksByRank(size_t ranks) const;

  std::vector<Sharding> shardings_;
  std::vector<PlannedTensor> tensors_;
  std::vector<std::vector<size_t>> of_sharding_;  // tensors by sharding
};

}  // namespace hsdp_ckpt::checkpoint
