#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "format/metadata.h"

namespace hsdp_ckpt::format {

/// A key or an index on the way to a value in a nested state dict.
using PathPart = std::variant<std::string_view, int64_t>;

/// Writes a `.metadata` file value by value, so that what it is made from need not be a whole
/// `Metadata` at any time: entries first, then planner data or paths, then records, then Finish. A
/// text that comes back is named, not written again: all texts that are passed in must stay where
/// they are until Finish. Not thread-safe; after an exception only destruction is left.
class MetadataEncoder {
 public:
  /// `expected`: bytes of the file, or more. Memory that is not used is only reserved; a file that
  /// grows would be there twice.
  explicit MetadataEncoder(size_t expected = 0);
  ~MetadataEncoder();
  MetadataEncoder(const MetadataEncoder&) = delete;
  MetadataEncoder& operator=(const MetadataEncoder&) = delete;

  void Entry(std::string_view name, const EntryMetadata& entry);
  /// Throws Error for planner data that is not in order or nested deeper than 200 levels.
  void PlannerData(const PlainData& data);
  /// Instead of planner data what DCP's default planner keeps there: for each name the way to its
  /// value.
  void BeginPaths();
  void Path(std::string_view name, std::span<const PathPart> path);
  /// Without it the file says nothing of records, not even that there are none.
  void BeginRecords();
  /// Throws Error for a record that is not inside the checkpoint's directory.
  void Record(std::string_view fqn, const std::optional<Shape>& chunk_offset,
              std::optional<int64_t> hint, std::string_view relative_path, int64_t offset,
              int64_t length,
              const std::optional<std::vector<std::string>>& transform_descriptors = std::nullopt);
  /// The whole file. Once.
  std::string Finish(const std::optional<StorageMeta>& meta,
                     const std::optional<std::string>& version);

 private:
  class Pickler;
  std::unique_ptr<Pickler> pickler_;
};

}  // namespace hsdp_ckpt::format
