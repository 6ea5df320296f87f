#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "format/file_index.h"

namespace hsdp_ckpt::checkpoint {

/// What one call of ShardFileWriter puts into its file: everything between two positions is an
/// extent (zero padding, a record's head, its payload, its tail, or plain bytes), one behind the
/// other. A record's checksums are put together here, in whatever order its payload is summed.
///
/// Extents are added by one thread, in the order of the file. Then several threads may assemble and
/// sum them at the same time: a tail waits for its payload's checksum. Memory that is added stays
/// where it is until the batch is gone.
class WriteBatch {
 public:
  /// A record from its head to its tail, over as many batches as its payload comes in.
  struct Record {
    /// The checksum of a range of the payload, within one of its checksum blocks.
    struct Part {
      int64_t from;
      int64_t size;
      uint32_t crc;
    };
    std::string name;
    format::IndexEntry entry;
    int64_t given = 0;  ///< payload bytes that sources have brought
    std::vector<std::byte> head;
    std::vector<std::byte> tail;  ///< encoded when the payload's checksum is known
    int64_t remaining = 0;        ///< payload bytes not summed yet
    bool summed = false;          ///< before they came here
    std::vector<Part> parts;
  };

  enum class Kind { kZeros, kHead, kPayload, kTail, kBytes };
  struct Extent {
    int64_t offset;
    int64_t size;
    Kind kind;
    Record* record;
    std::span<const std::byte> bytes;
    int64_t first;  ///< of a payload: where in it the extent begins

    int64_t end() const { return offset + size; }
  };
  using ExtentIterator = std::vector<Extent>::const_iterator;

  /// `begin`: the position in the file where the first extent will be.
  explicit WriteBatch(int64_t begin) : end_(begin) {}

  int64_t end() const { return end_; }
  /// The extent that has byte `at` of the file.
  ExtentIterator ExtentAt(int64_t at) const;
  const std::vector<std::unique_ptr<Record>>& complete_records() const { return complete_records_; }

  void AddZeros(int64_t size) { Add(size, Kind::kZeros, nullptr, {}); }
  void AddBytes(std::span<const std::byte> bytes);
  void AddHead(Record& record);
  /// A part of the payload, from its byte `first` on.
  void AddPayload(Record& record, std::span<const std::byte> bytes, int64_t first);
  /// The end of a record whose payload has all been added.
  void AddTail(std::unique_ptr<Record> record);

  /// Takes checksums of a whole payload that somebody else has summed, one a checksum block.
  void SetChecksums(Record& record, std::span<const uint32_t> block_crcs);
  /// Takes the checksums of payload bytes from `from` on, in consecutive pieces. With the last ones
  /// the record's tail is made.
  void AddChecksums(Record& record, int64_t from, std::span<const uint32_t> crcs,
                    std::span<const int64_t> sizes);
  /// Puts `target.size()` bytes of an extent, from file position `from` on, where they will be
  /// written from, and sums a payload's on the way. Throws Error after Fail.
  void Assemble(const Extent& extent, int64_t from, std::span<std::byte> target);
  /// A worker has failed: others may be waiting for a checksum that now never comes.
  void Fail();

 private:
  void Add(int64_t size, Kind kind, Record* record, std::span<const std::byte> bytes,
           int64_t first = 0);
  void Complete(Record& record);
  void WaitForTail(const Record& record);
  void AssemblePayload(const Extent& extent, int64_t at, std::span<std::byte> target);

  std::vector<std::unique_ptr<Record>> complete_records_;
  std::vector<Extent> extents_;  // by offset, without gaps
  int64_t end_;
  std::mutex mutex_;  // guards what a record learns while blocks are written
  std::condition_variable tail_ready_;
  bool failed_ = false;
};

}  // namespace hsdp_ckpt::checkpoint
