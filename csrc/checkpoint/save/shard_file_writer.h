#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "base/aligned_buffer.h"
#include "checkpoint/save/write_batch.h"
#include "format/data_file_name.h"
#include "format/file_index.h"
#include "io/file.h"

namespace hsdp_ckpt::checkpoint {

/// One record to be written, or a part of its payload. `data` must stay as it is until Write
/// returns.
///
/// A payload that does not lie in memory in one piece comes in several sources one after the other,
/// in one Write or in many: all have the same name, dtype and shape, and `first` says where in the
/// payload the part begins.
struct RecordSource {
  std::string name;                            ///< the tensor's, for messages
  const format::RecordDtype* dtype = nullptr;  ///< null: an object, written as it is
  std::vector<int64_t> shape;
  std::span<const std::byte> data;  ///< contiguous; to the end of the payload, or a part of it
  int64_t first = 0;                ///< bytes of the payload before `data`
};

/// Memory laid out as a stretch of a file: what stands at `offset` in the file lies at its
/// beginning. Both are multiples of 4096, as is its size. Payloads in it are in their places before
/// they are given to the writer, which puts the rest around them, and are written from there: what
/// is not a payload there is the writer's to change until the file is finished.
struct FileImage {
  int64_t offset = 0;
  std::span<std::byte> memory;
  /// For a whole payload that begins there: the CRC-32 of each of its base::kChecksumBlock, if they
  /// are known; else empty.
  std::function<std::span<const uint32_t>(const std::byte* payload)> checksums{};
};

struct WriterOptions {
  int threads = 2;      ///< that assemble and write blocks
  bool direct = true;   ///< past the page cache where the file system allows it
  bool sync = true;     ///< the file's bytes are durable when Finish returns
  int64_t reserve = 0;  ///< bytes to reserve at the start, 0: none; a full disk then says so before
                        ///< a byte is written
  /// Bytes of a write, a multiple of 4096. Small: what the workers of a host's ranks have in hand
  /// is to stay in its cache.
  size_t block = 1u << 20;
  /// Whose the file's first records are, see format::RecordOwner. 0: it is not known here, but an
  /// object is its own name's.
  std::vector<uint32_t> owners{};
  FileImage image{};  ///< blocks that lie in it as a whole are assembled and written there, without
                      ///< a second copy
};

struct WrittenFile {
  int64_t size = 0;
  bool direct = false;  ///< whether the bytes went past the page cache to the end
};

/// Writes one data file: records in the order they come, then the index.
///
/// Works in blocks. A worker assembles a block (copy and checksum in one pass over the memory) and
/// writes it while others assemble theirs, so memory is bounded by (threads + 1) blocks whatever
/// the file's size. Only a record's tail depends on earlier bytes, through the payload's CRC: a
/// worker that comes to a tail waits for the workers of earlier blocks, which never wait for a
/// later one. Buffered files get large payloads straight from where they are; so do direct ones
/// from an image, where a worker only sums them, unless they are summed already.
///
/// The file must not exist: data files are never overwritten. One that was not finished is removed
/// by the destructor. Not thread-safe. After an exception only destruction is left.
class ShardFileWriter {
 public:
  ShardFileWriter(io::FileSystem& fs, const std::string& directory,
                  const format::DataFileName& name, const WriterOptions& options);
  ~ShardFileWriter();
  ShardFileWriter(const ShardFileWriter&) = delete;
  ShardFileWriter& operator=(const ShardFileWriter&) = delete;

  /// Where a record lies in the file, as DCP's metadata wants it.
  struct Place {
    int64_t offset = 0;
    int64_t length = 0;
  };
  /// The places of the records that begin in this call; a record's later parts have none. Throws
  /// Error for parts that leave a gap, for data that is longer than the payload, and for data in
  /// the image at another place than its own.
  std::vector<Place> Write(std::span<const RecordSource> sources);
  /// Writes the index, gives the file its exact length, syncs and closes it. The directory is the
  /// caller's to sync.
  WrittenFile Finish();

 private:
  enum class Flushing { kMoreFollows, kEnd };
  /// A block's memory: in the image, or in `buffer`, which is null otherwise.
  struct AssembledBlock {
    base::AlignedBuffer buffer;
    std::span<std::byte> memory;
  };

  Place Begin(WriteBatch& batch, const RecordSource& source);
  void CheckContinues(const RecordSource& source) const;
  void CheckFits(const RecordSource& source) const;
  void CheckPlace(const RecordSource& source, int64_t offset) const;
  void TakeChecksums(WriteBatch& batch, const RecordSource& source);
  void Flush(WriteBatch& batch, Flushing flushing);
  AssembledBlock AssembleBlock(WriteBatch& batch, int64_t begin, int64_t end,
                               base::AlignedBuffer prefix);
  void KeepBlock(WriteBatch& batch, int64_t begin, int64_t end, base::AlignedBuffer prefix);
  void WriteBlock(WriteBatch& batch, int64_t begin, int64_t end, base::AlignedBuffer prefix);
  void WriteBlockBuffered(WriteBatch& batch, int64_t begin, int64_t end);
  void WritePayload(WriteBatch& batch, const WriteBatch::Extent& extent, int64_t from, int64_t to);
  /// The image's memory for bytes [begin, end) of the file; empty if it has not all of them.
  std::span<std::byte> InImage(int64_t begin, int64_t end) const;
  base::AlignedBuffer TakeBuffer();
  void GiveBuffer(base::AlignedBuffer buffer);

  io::FileSystem& fs_;
  const std::string path_;
  const uint64_t save_id_;
  const WriterOptions options_;
  format::IndexEncoder index_;  // of the records that are complete
  std::unique_ptr<io::File> file_;
  std::unique_ptr<WriteBatch::Record> open_;  // its payload is not complete yet
  size_t begun_ = 0;                          // records
  bool finished_ = false;
  int64_t position_ = 0;  // where the next record may begin
  int64_t flushed_ = 0;   // everything before it is in the file; behind it, up to position_, in
                          // carry_ or in the image
  base::AlignedBuffer carry_;
  std::mutex buffers_mutex_;
  std::vector<base::AlignedBuffer> buffers_;
};

}  // namespace hsdp_ckpt::checkpoint
