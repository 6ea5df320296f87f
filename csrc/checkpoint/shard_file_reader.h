#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/data_file_name.h"
#include "checkpoint/file_index.h"
#include "checkpoint/stock_record.h"
#include "io/file.h"

namespace hsdp_ckpt {

/// A part of one tensor's storage, and where it goes.
struct PayloadRead {
  std::string name;             ///< the tensor's, for messages
  int64_t offset = 0;           ///< the record's, as `.metadata` has it
  int64_t length = 0;           ///< likewise
  int64_t first = 0;            ///< first byte wanted, within the payload
  std::span<std::byte> target;  ///< filled with the wanted bytes
};

/// Reads records from one data file, ours or stock torch's, and checks every byte that it hands out.
///
/// Ours: the index says where everything is and has checksums of 1 MiB blocks, so a part is checked without the rest; with
/// a part of a record its framing is checked too. Stock's: a record's zip has one CRC for the payload, so all of it is
/// read. The index is required where the file's name says that it is ours, and has to carry the save id in the name. After
/// an exception the targets hold nothing to be trusted. Describe is not thread-safe.
class ShardFileReader {
 public:
  /// `name` is relative to `directory`. Throws IoError, CorruptionError.
  ShardFileReader(FileSystem& fs, const std::string& directory, const std::string& name);

  bool has_index() const { return index_.has_value(); }
  /// What the record is; nullopt for an object, or a tensor only torch can read. CorruptionError if there is no such
  /// record.
  std::optional<TensorDescription> Describe(const std::string& name, int64_t offset, int64_t length);
  /// Reads with up to `threads` threads. All records have been described as tensors before.
  void Read(std::span<const PayloadRead> reads, int threads);
  /// An object's bytes, or all bytes of a record that Describe gave nullopt for, checked.
  std::vector<std::byte> ReadBytes(const std::string& name, int64_t offset, int64_t length);

 private:
  const IndexEntry& Find(const std::string& name, int64_t offset, int64_t length) const;
  void CheckFraming(const IndexEntry& entry, std::span<const std::byte> head, std::span<const std::byte> tail,
                    const std::string& name) const;
  void ReadFraming(const IndexEntry& entry, const std::string& name) const;
  void ReadBlocks(const IndexEntry& entry, const PayloadRead& read, size_t first_block, size_t last_block) const;
  void ReadSmall(std::span<const PayloadRead* const> group) const;
  void ReadStock(const PayloadRead& read, int threads) const;

  File file_;
  int64_t size_;
  std::optional<FileIndex> index_;
  std::map<std::pair<int64_t, int64_t>, StockRecord> stock_;
};

}  // namespace hsdp_ckpt
