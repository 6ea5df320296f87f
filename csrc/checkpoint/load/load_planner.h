#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "format/metadata.h"
#include "io/file_system.h"

namespace hsdp_ckpt::checkpoint {

/// A box of a tensor, in elements.
struct Box {
  format::Shape offsets;
  format::Shape sizes;
};

/// What one record gives to one box.
struct ChunkRead {
  const format::StorageInfo* place;
  format::Shape in_record;  ///< where the part begins, within the record's tensor
  format::Shape in_box;     ///< and within the box
  format::Shape sizes;
};

/// How LoadPlanner::CheckSizes compares sizes.
enum class SizeCheck : uint8_t {
  kStrict,
  /// For tensors that are not made from metadata alone: all may be 64 times as long, as a tensor
  /// that only torch can rebuild may be, those of another layout than strided of any size, and
  /// missing files are left to those who open them.
  kLenient,
};

/// Finds the records that a rank's tensors need, in a checkpoint's whole metadata: what DCP's
/// default planner does, without a Python object for each of possibly millions of chunks.
///
/// Everything asked for must be there, once: a box that the chunks do not cover, or cover twice, or
/// a chunk without a record is a CorruptionError. Owns the metadata; immutable, so thread-safe.
class LoadPlanner {
 public:
  /// `path` is that of `.metadata`, for messages.
  LoadPlanner(format::Metadata metadata, std::string path);

  const format::Metadata& metadata() const { return metadata_; }
  const std::string& path() const { return path_; }
  /// Null if there is no entry of that name.
  const format::EntryMetadata* Find(std::string_view name) const;
  /// Whether some record has to be decoded by an extension before it is one.
  bool has_transforms() const { return has_transforms_; }
  /// The records that a box of the tensor `name` needs. The box lies inside the tensor.
  std::vector<ChunkRead> Plan(std::string_view name, const Box& box) const;
  /// Throws CorruptionError unless the chunks of `name` cover all of it once. Objects and names
  /// that the checkpoint does not have pass.
  void CheckCovered(std::string_view name) const;
  /// Throws CorruptionError if tensors made as the metadata has them would take more memory than
  /// the files in `directory` explain: each may be as long as its records together, those of one
  /// file as long as it. Throws IoError as well.
  void CheckSizes(io::FileSystem& fs, const std::string& directory, SizeCheck check) const;
  /// The place of an entry that is an object.
  const format::StorageInfo& PlaceOfObject(std::string_view name) const;

 private:
  /// One data file, and what `.metadata` says of all records in it.
  struct FileUse {
    const std::string* file;
    const std::string* record;  ///< the name of one of them, for messages
    uint64_t bytes;
  };
  struct RecordsOfTensor {
    uint64_t bytes = 0;
    bool has_transforms = false;
  };
  const format::StorageInfo& PlaceOf(std::string_view name,
                                     const std::optional<format::Shape>& offset) const;
  void CheckDisjoint(std::string_view name, std::span<const ChunkRead> reads) const;
  std::vector<FileUse> FilesUsed() const;
  RecordsOfTensor RecordsOf(std::string_view name) const;
  void CheckTensorSize(const std::string& name, const format::TensorMetadata& tensor,
                       SizeCheck check) const;
  static void CheckFileSize(io::FileSystem& fs, const std::string& directory, const FileUse& use,
                            SizeCheck check);

  format::Metadata metadata_;
  std::string path_;
  std::unordered_map<std::string_view, size_t> entries_;
  std::unordered_map<std::string_view, std::vector<uint32_t>>
      records_;  // of each name, by the chunk's offset
  bool has_transforms_ = false;
};

}  // namespace hsdp_ckpt::checkpoint
