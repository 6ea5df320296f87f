#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "checkpoint/load/read_plan.h"

namespace hsdp_ckpt::checkpoint {

/// A box of a tensor's record, and memory for it.
struct ItemRequest {
  std::string name;
  uint32_t file = 0;   ///< as CheckpointReader::Open numbers them
  int64_t offset = 0;  ///< the record's, as `.metadata` has it
  int64_t length = 0;
  std::vector<int64_t> box_offsets;  ///< in elements, within the record's tensor
  std::vector<int64_t> box_lengths;
  const format::DType* target_dtype =
      nullptr;                  ///< null: there is no memory that takes the box as it is stored
  std::byte* target = nullptr;  ///< contiguous, for all of the box
};

/// How an item can be read.
struct ItemAnswer {
  enum class Kind : uint8_t {
    kLands,   ///< one range of the record, straight into the target: `read` is ready to go
    kStaged,  ///< the caller reads the range into memory of its own and takes the box from there
    kTorch,   ///< a record that only torch can read
  };
  Kind kind = Kind::kTorch;
  format::TensorDescription tensor;  ///< kStaged: the record's
  PlannedRead read;                  ///< kLands
};

/// A checkpoint's data files for one load: each opened once, described, and read by as many plans
/// as it takes.
///
/// Open files stay readable when a save removes them. Not thread-safe; plans made of `files` are.
class CheckpointReader {
 public:
  /// `direct`: what ReadPlan::Fill reads goes past the page cache where a file is not in it.
  CheckpointReader(io::FileSystem& fs, std::string directory, bool direct)
      : fs_(fs), directory_(std::move(directory)), direct_(direct) {}

  /// Opens those files that are not open yet, with up to `threads` threads, and numbers them in the
  /// order they came. Throws what ShardFileReader throws; then none of the new ones is open.
  std::vector<uint32_t> Open(std::span<const std::string> names, int threads);
  /// Throws CorruptionError for a box that does not lie within its record.
  std::vector<ItemAnswer> Resolve(std::span<const ItemRequest> items, int threads);
  std::span<const std::unique_ptr<ShardFileReader>> files() const { return files_; }
  ShardFileReader& file(uint32_t number) { return *files_.at(number); }

 private:
  ItemAnswer Answer(const ItemRequest& item);

  io::FileSystem& fs_;
  std::string directory_;
  bool direct_;
  std::unordered_map<std::string, uint32_t> numbers_;
  std::vector<std::unique_ptr<ShardFileReader>> files_;
};

}  // namespace hsdp_ckpt::checkpoint
