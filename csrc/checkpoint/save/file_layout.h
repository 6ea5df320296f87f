#pragma once

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "checkpoint/save/chunk_list.h"
#include "checkpoint/save/planned_tensor.h"
#include "format/file_index.h"
#include "format/record.h"
#include "format/tensor_pickle.h"

namespace hsdp_ckpt::checkpoint {

/// A record's place in its data file.
struct PlannedRecord {
  int64_t offset = 0;
  int64_t length = 0;
  int64_t payload = 0;  ///< where its payload begins in the file
  uint32_t owner = 0;   ///< of a tensor's chunk in Layout's result, see format::RecordOwner
};

struct PlannedFile {
  std::vector<PlannedRecord> records;
  int64_t size = 0;  ///< of the whole file, index included
};

/// Sizes of framing by dtype and shape, which repeat from shard to shard: making a frame costs
/// microseconds.
class RecordSizes {
 public:
  const format::RecordSize& Of(const format::RecordDtype& dtype, const format::Shape& sizes) {
    const auto found = known_.find({dtype.code, sizes});
    if (found != known_.end()) return found->second;
    return known_.emplace(std::pair(dtype.code, sizes), format::SizeOfRecord(dtype, sizes))
        .first->second;
  }

 private:
  std::map<std::pair<uint8_t, format::Shape>, format::RecordSize> known_;
};

/// A rank's files, record by record.
class FileLayout {
 public:
  FileLayout(const std::vector<PlannedTensor>& tensors, bool single_file, RecordSizes& sizes)
      : tensors_(tensors), single_file_(single_file), sizes_(sizes) {}

  PlannedRecord AddObject(int64_t size) {
    Next();
    return Add(position_, size, 0, size, 0);
  }
  PlannedRecord AddChunk(const PlannedChunk& chunk) {
    Next();
    const format::RecordSize& size = sizes_.Of(*tensors_[chunk.tensor].dtype, chunk.sizes);
    return Add(format::RecordStart(position_, size), size.total(), size.head, size.payload,
               chunk.sizes.size());
  }
  /// So far; the last one holds what was added last.
  size_t files() const { return files_; }
  /// The size of the last file, if nothing more comes into it.
  int64_t size() const { return format::IndexStart(position_) + index_ + format::kIndexTail; }

 private:
  PlannedRecord Add(int64_t offset, int64_t length, int64_t head, int64_t payload,
                    size_t dimensions) {
    position_ = offset + length;
    index_ += format::IndexEntrySize(payload, dimensions);
    return {offset, length, offset + head};
  }
  void Next() {
    if (files_ > 0 && single_file_) return;
    ++files_;
    position_ = index_ = 0;
  }

  const std::vector<PlannedTensor>& tensors_;
  const bool single_file_;
  RecordSizes& sizes_;
  size_t files_ = 0;
  int64_t position_ = 0;  // where the next record may begin
  int64_t index_ = 0;     // how long the index is by now
};

}  // namespace hsdp_ckpt::checkpoint
