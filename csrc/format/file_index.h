#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/bytes.h"
#include "format/record_dtype.h"

namespace hsdp_ckpt::format {

/// One record of a data file: a tensor, framed as format/record.h has it, or an object's bytes as
/// DCP's planner gave them (dtype null, no head, no tail).
struct IndexEntry {
  int64_t offset = 0;
  int64_t head = 0;
  int64_t payload = 0;
  int64_t tail = 0;
  const RecordDtype* dtype = nullptr;
  std::vector<int64_t> shape;
  uint32_t framing_crc = 0;  ///< of head and tail, one after the other
  uint32_t payload_crc = 0;
  uint32_t owner = 0;  ///< whose it is, see RecordOwner; 0: the file does not say
  std::vector<uint32_t>
      block_crcs;  ///< of each base::kChecksumBlock of the payload, the last one shorter

  int64_t length() const { return head + payload + tail; }
  int64_t end() const { return offset + length(); }
};

/// What stands at the end of every data file of ours: all records with the checksums of every byte
/// of them. Stock torch never looks beyond a record's end, so it is invisible to it.
/// docs/design/format.md has the bytes.
struct FileIndex {
  uint64_t save_id = 0;
  std::vector<IndexEntry> entries;  ///< by offset, not overlapping
};

/// Which tensor's chunk, or which object, a record holds: a CRC-32 of the name and of where the
/// chunk begins in the whole tensor (empty for an object); never 0. It tells records of one save
/// apart; saves are told apart by their ids.
uint32_t RecordOwner(std::string_view name, std::span<const int64_t> chunk);

constexpr int64_t kIndexTail = 64;  ///< bytes of the fixed part at the very end

/// Bytes that a record takes in the index: known before a byte of the file is written.
int64_t IndexEntrySize(int64_t payload, size_t dimensions);

/// An index that is made while its file is written, as the bytes that it will be: an entry of it is
/// five times as large.
class IndexEncoder {
 public:
  /// Entries come by offset.
  void Add(const IndexEntry& entry);
  /// Index and tail for a file whose records end at or before `index_offset`. Once.
  std::vector<std::byte> Finish(uint64_t save_id, int64_t index_offset);

 private:
  base::ByteWriter out_;
  uint64_t entries_ = 0;
};

/// Where a file's records may end at the earliest for the index to begin there.
inline int64_t IndexStart(int64_t records_end) { return (records_end + 7) / 8 * 8; }

struct IndexPlace {
  int64_t offset = 0;
  int64_t size = 0;
  uint64_t records = 0;
  uint64_t save_id = 0;
  uint32_t crc = 0;
  uint32_t version = 0;  ///< 1: entries do not say whose records they are
};

/// From the last kIndexTail bytes of a file of `file_size`. Hostile input: CorruptionError naming
/// `path`.
IndexPlace DecodeIndexTail(std::span<const std::byte> tail, int64_t file_size,
                           const std::string& path);
/// `bytes` is what stands at `place`. All offsets and sizes of the result lie within the records'
/// part of the file.
FileIndex DecodeIndex(std::span<const std::byte> bytes, const IndexPlace& place,
                      const std::string& path);
/// Whether a file that ends so claims to have an index.
bool HasIndexMagic(std::span<const std::byte> tail);

}  // namespace hsdp_ckpt::format
