#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "base/aligned_buffer.h"
#include "checkpoint/load/shard_file_reader.h"

namespace hsdp_ckpt::checkpoint {

/// A range of one file that is read in one go, and what is in it.
struct Extent {
  uint32_t file = 0;
  int64_t begin = 0;
  int64_t end = 0;
  uint32_t first = 0;  ///< number of its first segment
  uint32_t last = 0;   ///< one past the number of its last segment
};

/// One of a plan's reads, and the number of the file it goes to.
struct PlannedRead {
  uint32_t file = 0;
  PayloadRead read;
};

/// Reads from many files at once: all that is asked for, sorted by file and offset, neighbours
/// together, in extents of a few MiB that threads and processes can share out among themselves.
/// Every byte is checked once, while it is in the cache.
///
/// What is read for several processes (Fill) goes past the page cache where the file system allows
/// that and the cache has not got it. What one reads for itself goes through it, since the kernel's
/// readahead beats direct requests of an extent at a time (2 cores, a virtual disk: 0.27 against
/// 0.42 s for 0.5 GiB); blocks that are wanted whole come straight to their targets. The plan
/// follows from the files and the reads' ranges alone, so that ranks which ask for the same have
/// the same extents, whatever their targets. Read, Fill and Deliver may run concurrently, for
/// different extents. After an exception the targets hold nothing to be trusted.
class ReadPlan {
 public:
  static constexpr int64_t kPage = 4096;
  static constexpr int64_t kExtentBytes = int64_t{2} << 20;
  /// A buffer for Fill: an extent with whole pages around it, and the checksums of its parts.
  static constexpr int64_t kBufferBytes = kExtentBytes + 2 * kPage + kPage;
  static constexpr uint32_t kMaxParts = kPage / sizeof(uint32_t);

  /// The readers outlive the plan; stock records have been described. Throws as
  /// ShardFileReader::Cut.
  ReadPlan(std::span<const std::unique_ptr<ShardFileReader>> files, std::vector<PlannedRead> reads);

  std::span<const Extent> extents() const { return extents_; }
  /// Reads and checks extent `i` and puts what is wanted of it in its targets.
  void Read(size_t i);
  /// The same by way of `buffer` (kBufferBytes, page-aligned), which then holds all that Deliver
  /// needs elsewhere.
  void Fill(size_t i, std::byte* buffer);
  /// Puts what is wanted of extent `i` in its targets, from a buffer that a plan with the same
  /// reads has filled and checked.
  void Deliver(size_t i, const std::byte* buffer);
  /// Reads all extents with up to `threads` threads, then calls Finish.
  void ReadAll(int threads);
  /// Checks what only the sum of several extents shows. All extents have been read or delivered.
  void Finish() const;
  /// Bytes of all extents: what reading the plan once takes.
  int64_t bytes() const;
  /// Equal for plans with the same extents, and only for those.
  std::string Digest() const;
  /// Bytes read from storage or the page cache so far, whole pages of direct reads included.
  int64_t bytes_read() const { return bytes_read_; }

 private:
  class Scratch;
  size_t CutReadsOfFile(size_t first, SegmentList& out) const;
  void JoinIntoExtents(uint32_t file, std::span<const Segment> segments, size_t first);
  uint32_t ReadInPlace(const Extent& extent, uint32_t first);
  uint32_t ReadThroughScratch(const Extent& extent, uint32_t first, Scratch& scratch);
  bool GoesDirect(const Extent& extent) const;
  void ReadRange(const ShardFileReader& file, bool direct, int64_t begin, int64_t end,
                 std::byte* at, const Segment& for_whom);
  void Process(const Extent& extent, uint32_t first, uint32_t last, const std::byte* bytes,
               int64_t begin);
  void Check(const Extent& extent, uint32_t number, std::span<const std::byte> bytes,
             std::span<std::byte> copy);
  void CheckRecord(const Extent& extent, const Segment& segment,
                   std::span<const std::byte> bytes) const;
  [[noreturn]] void Fail(uint32_t file, const Segment& segment, const std::string& expected,
                         const std::string& got) const;

  std::vector<const ShardFileReader*> files_;
  std::vector<PlannedRead> reads_;
  std::vector<Segment> segments_;  // by file and offset
  std::vector<SegmentList::Group> groups_;
  std::vector<uint32_t> part_crcs_;  // by segment; only if there are groups
  std::vector<Extent> extents_;
  std::atomic<int64_t> bytes_read_{0};
  std::mutex mutex_;
  std::vector<base::AlignedBuffer> idle_;  // buffers for Read, as many as there were threads
};

}  // namespace hsdp_ckpt::checkpoint
