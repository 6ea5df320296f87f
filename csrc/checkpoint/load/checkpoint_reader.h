#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "checkpoint/load/read_plan.h"
#include "io/file_pool.h"

namespace hsdp_ckpt::checkpoint {

/// Where `.metadata` says that a record is.
struct RecordPlace {
  std::string name;  ///< the tensor's or the object's
  std::string file;  ///< relative to the checkpoint's directory
  int64_t offset = 0;
  int64_t length = 0;
  uint32_t owner = 0;  ///< whose it is to be, see format::RecordOwner; 0: that is not asked
};

/// A box of a tensor's record, and memory for it.
struct BoxRead {
  RecordPlace record;
  std::vector<int64_t> offsets;  ///< in elements, within the record's tensor
  std::vector<int64_t> lengths;
  /// The dtype of the memory; null if there is none that takes the box as it is stored.
  const format::RecordDtype* target_dtype = nullptr;
  std::byte* target = nullptr;  ///< contiguous, for all of the box
};

/// A range of a record's payload, and memory for it.
struct RangeRead {
  RecordPlace record;
  int64_t first = 0;  ///< first byte, within the payload
  int64_t size = 0;
  std::byte* target = nullptr;
};

/// How a BoxRead can be done.
struct BoxStrategy {
  enum class Kind : uint8_t {
    kInPlace,  ///< one range of the record, straight into the target: `read` is ready to go
    kStaged,   ///< the caller reads ranges into memory of its own and takes the box from there
    kTorch,    ///< only torch can make a tensor of the record
  };
  Kind kind = Kind::kTorch;
  format::TensorDescription tensor;  ///< kStaged: the record's
  PlannedRead read;                  ///< kInPlace
};

/// A checkpoint's data files for one load: each opened once, described, and read by as many plans
/// as it takes. The records themselves are checked by the ShardFileReader of their file.
///
/// Open files stay readable when a save removes them. With more files than may be open at a time
/// (see io::FilePool) that does not hold for all: one that has gone meanwhile is an IoError. Not
/// thread-safe; plans made of `files` are.
class CheckpointReader {
 public:
  /// `direct`: what ReadPlan::Fill reads goes past the page cache where a file is not in it.
  CheckpointReader(io::FileSystem& fs, std::string directory, bool direct)
      : pool_(fs), directory_(std::move(directory)), direct_(direct) {}

  /// Opens those files that are not open yet, with up to `threads` threads. All other functions
  /// take names of open files only. Throws what ShardFileReader throws; then none of the new ones
  /// is open.
  void Open(std::span<const std::string> names, int threads);
  /// Throws CorruptionError for a box that does not lie within its record.
  std::vector<BoxStrategy> Resolve(std::span<const BoxRead> boxes, int threads);
  /// The reader outlives the plan. Records of stock files have been resolved before.
  std::unique_ptr<ReadPlan> Plan(std::span<const RangeRead> ranges) const;
  /// The bytes of each object, checked.
  std::vector<std::vector<std::byte>> ReadObjects(std::span<const RecordPlace> objects,
                                                  int threads) const;
  std::span<const std::unique_ptr<ShardFileReader>> files() const { return files_; }

 private:
  uint32_t NumberOf(const std::string& file) const;
  BoxStrategy ResolveOne(const BoxRead& box, uint32_t file);

  io::FilePool pool_;  // outlives the files
  std::string directory_;
  bool direct_;
  std::unordered_map<std::string, uint32_t> numbers_;
  std::vector<std::unique_ptr<ShardFileReader>> files_;  // in the order in which they were opened
};

}  // namespace hsdp_ckpt::checkpoint
