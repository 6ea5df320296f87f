#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/load/stock_record.h"
#include "format/data_file_name.h"
#include "format/file_index.h"
#include "io/file.h"

namespace hsdp_ckpt::checkpoint {

/// A part of one tensor's payload (or of an object of ours), and where it goes.
struct PayloadRead {
  std::string name;             ///< the tensor's, for messages
  int64_t offset = 0;           ///< the record's, as `.metadata` has it
  int64_t length = 0;           ///< likewise
  int64_t first = 0;            ///< first byte wanted, within the payload
  int64_t size = 0;             ///< bytes wanted
  std::byte* target = nullptr;  ///< where they go; null: they are only checked
};

/// A range of a data file with a check of its own, and the part of it that somebody wants.
struct Segment {
  enum class Kind : uint8_t {
    kBlock,   ///< has the checksum `crc`
    kPart,    ///< one of several ranges that share a checksum: number `crc` of SegmentList::groups
    kRecord,  ///< a small record of ours: framing and payload as `entry` has them
    kZeros,   ///< padding
  };
  int64_t begin = 0;  ///< in the file
  int64_t end = 0;
  const format::IndexEntry* entry = nullptr;
  std::byte* target = nullptr;
  uint32_t from = 0;  ///< wanted are bytes [from, to) of the range
  uint32_t to = 0;
  uint32_t crc = 0;
  uint32_t read = 0;  ///< number of the PayloadRead it serves, for messages
  Kind kind = Kind::kBlock;
};

struct SegmentList {
  struct Group {
    uint32_t crc;  ///< of all its parts, in the order of the file
    uint32_t read;
  };
  std::vector<Segment> segments;
  std::vector<Group> groups;
};

/// One data file, ours or stock torch's: what records it has, and which of its bytes a read needs,
/// with their checks.
///
/// This is where a record's header is checked. Ours: against the checksum of the record's framing
/// in the file's index; Cut adds the framing to what is read, and ReadPlan compares (CheckRecord,
/// and Finish for what was read in blocks).
/// Stock's: by OpenStockRecord (stock_record.h), which Describe calls, before anything in it is
/// believed.
///
/// Ours: the index says where everything is and has checksums of small blocks, so a part is checked
/// without the rest; with a part of a record its framing and the padding before it are checked too.
/// Stock's: a record's zip has one CRC for the payload, so all of it is read. The index is required
/// where the file's name says that it is ours, and has to carry the save id in the name. Describe
/// is not thread-safe; the rest is.
class ShardFileReader {
 public:
  /// `name` is relative to `directory` and may not lead out of it. Throws IoError, CorruptionError,
  /// Error. `direct`: past the page cache where the file system allows it.
  ShardFileReader(io::FileSystem& fs, const std::string& directory, const std::string& name,
                  bool direct = true);

  bool has_index() const { return index_.has_value(); }
  const format::FileIndex& index() const { return *index_; }
  int64_t size() const { return size_; }
  const io::File& file() const { return file_; }
  /// The same file past the page cache; null where the file system refuses that.
  const io::File* direct() const { return direct_ ? &*direct_ : nullptr; }
  /// What the record is; nullopt for an object, or a tensor only torch can read. CorruptionError if
  /// there is no such record, or it is another's than `owner` (see format::RecordOwner), if that is
  /// not 0.
  std::optional<format::TensorDescription> Describe(const std::string& name, int64_t offset,
                                                    int64_t length, uint32_t owner = 0);
  /// Appends what `read`, number `number` of its plan, takes from this file. A stock record has
  /// been described before. `same_record`: the framing is there already, for an earlier part of the
  /// same record.
  void Cut(const PayloadRead& read, uint32_t number, bool same_record, SegmentList& out) const;
  /// An object's bytes, or all bytes of a record that Describe gave nullopt for, checked.
  /// Throws as Describe.
  std::vector<std::byte> ReadBytes(const std::string& name, int64_t offset, int64_t length,
                                   uint32_t owner = 0) const;

 private:
  void ReadIndex(const std::string& name);
  const format::IndexEntry& Find(const std::string& name, int64_t offset, int64_t length,
                                 uint32_t owner = 0) const;
  std::vector<std::byte> ReadObject(const format::IndexEntry& entry, const std::string& name) const;
  void CheckRange(const std::string& name, int64_t offset, int64_t length) const;
  std::pair<int64_t, int64_t> WithPadding(const format::IndexEntry& entry) const;
  void CutPadding(const format::IndexEntry& entry, uint32_t number, SegmentList& out) const;
  static void CutFraming(const format::IndexEntry& entry, uint32_t number, SegmentList& out);
  static void CutBlocks(const format::IndexEntry& entry, const PayloadRead& read, uint32_t number,
                        SegmentList& out);
  void CutStock(const PayloadRead& read, uint32_t number, SegmentList& out) const;

  io::File file_;
  std::optional<io::File> direct_;
  int64_t size_;
  int64_t records_end_ = 0;  // where the index begins
  std::optional<format::FileIndex> index_;
  std::map<std::pair<int64_t, int64_t>, StockRecord> stock_;
};

}  // namespace hsdp_ckpt::checkpoint
