// How a data file is written. Everything between two positions of the file is an extent: zero
// padding, a record's head, its payload, its tail, or plain bytes (objects, the index). A block is
// a range of the file; what of which extents falls into it is found by binary search.
#include "checkpoint/save/shard_file_writer.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstring>

#include "base/crc32.h"
#include "base/error.h"
#include "base/parallel.h"
#include "format/record.h"
#include "format/tensor_pickle.h"

namespace hsdp_ckpt::checkpoint {
namespace {

// Payload pieces of at least this size go from their own memory to a buffered file; smaller ones
// are gathered.
constexpr int64_t kGather = 64 << 10;
// A buffered write's step: summed, then copied by the kernel while it is still in the second-level
// cache.
constexpr int64_t kStep = 256 << 10;

enum class Kind { kZeros, kHead, kPayload, kTail, kBytes };

}  // namespace

struct ShardFileWriter::Record {
  std::string name;
  format::IndexEntry entry;
  int64_t given = 0;  // payload bytes that sources have brought
  std::vector<std::byte> head;
  std::vector<std::byte> tail;  // encoded when the payload's checksum is known
  int64_t remaining = 0;        // payload bytes not summed yet
  bool summed = false;          // before they came here
  struct Part {
    int64_t from;
    int64_t size;
    uint32_t crc;
  };
  std::vector<Part> parts;
};

struct ShardFileWriter::Extent {
  int64_t offset;
  int64_t size;
  Kind kind;
  Record* record;
  std::span<const std::byte> bytes;
  int64_t first;  // of a payload: where in it the extent begins
};

struct ShardFileWriter::Batch {
  std::vector<std::unique_ptr<Record>> records;
  std::vector<Extent> extents;  // by offset, without gaps
  int64_t end = 0;
  std::mutex mutex;  // guards what a record learns while blocks are written
  std::condition_variable tail_ready;
  bool failed = false;

  void Add(int64_t size, Kind kind, Record* record, std::span<const std::byte> bytes,
           int64_t first = 0) {
    if (size > 0) extents.push_back({end, size, kind, record, bytes, first});
    end += size;
  }

  // The extent that has byte `at` of the file.
  std::vector<Extent>::const_iterator ExtentAt(int64_t at) const {
    return std::upper_bound(
        extents.begin(), extents.end(), at,
        [](int64_t byte, const Extent& extent) { return byte < extent.offset + extent.size; });
  }

  // A worker has failed: others may be waiting for a checksum that now never comes.
  void Fail() {
    const std::lock_guard lock(mutex);
    failed = true;
    tail_ready.notify_all();
  }
};

ShardFileWriter::ShardFileWriter(io::FileSystem& fs, const std::string& directory,
                                 const format::DataFileName& name, const WriterOptions& options)
    : fs_(fs),
      path_(io::JoinPath(directory, name.ToString())),
      save_id_(name.save_id),
      options_(options) {
  if (options.direct) {
    try {
      file_ = std::make_unique<io::File>(io::File::Open(fs_, path_, io::OpenMode::kCreateDirect));
    } catch (const base::IoError& error) {
      if (error.error_number() != EINVAL) throw;  // EINVAL: this file system has no direct I/O
    }
  }
  if (!file_) file_ = std::make_unique<io::File>(io::File::Open(fs_, path_, io::OpenMode::kCreate));
  try {
    if (options.reserve > 0) file_->Allocate(options.reserve);
  } catch (...) {
    io::RemoveFile(fs_, path_);
    throw;
  }
}

ShardFileWriter::~ShardFileWriter() {
  if (finished_) return;
  file_.reset();
  try {
    io::RemoveFile(fs_, path_);
  } catch (const base::IoError&) {
    // Nothing names this file: the next save into the directory removes it when this process is
    // gone.
  }
}

// Lays out the head of a record that begins with this source.
ShardFileWriter::Record* ShardFileWriter::Begin(Batch& batch, const RecordSource& source,
                                                std::vector<Place>& places) {
  open_ = std::make_unique<Record>();
  open_->name = source.name;
  format::IndexEntry& entry = open_->entry;
  entry.dtype = source.dtype;
  entry.shape = source.shape;
  entry.payload = static_cast<int64_t>(source.data.size());
  if (source.dtype != nullptr) {
    const format::RecordSize size = format::SizeOfRecord(*source.dtype, source.shape);
    entry.payload = size.payload;
    entry.head = size.head;
    entry.tail = size.tail;
    entry.offset = format::RecordStart(batch.end, size);
    open_->head = format::EncodeRecordHead(*source.dtype, source.shape);
  } else {
    entry.offset = batch.end;
  }
  entry.framing_crc = base::Crc32(open_->head);
  open_->remaining = entry.payload;
  batch.Add(entry.offset - batch.end, Kind::kZeros, nullptr, {});
  batch.Add(entry.head, Kind::kHead, open_.get(), open_->head);
  places.push_back({entry.offset, entry.length()});
  return open_.get();
}

std::vector<ShardFileWriter::Place> ShardFileWriter::Write(std::span<const RecordSource> records) {
  Batch batch;
  batch.end = position_;
  std::vector<Place> places;
  for (const RecordSource& source : records) {
    const auto size = static_cast<int64_t>(source.data.size());
    if (open_ && (source.first != open_->given || source.name != open_->name)) {
      throw base::Error(source.name + ": a part of the payload at " + std::to_string(source.first) +
                        " where byte " + std::to_string(open_->given) + " of " + open_->name +
                        " has to follow");
    }
    Record* record = open_ ? open_.get() : Begin(batch, source, places);
    const format::IndexEntry& entry = record->entry;
    if (source.first != record->given || size > entry.payload - record->given ||
        (size == 0 && entry.payload > 0)) {
      throw base::Error(source.name + ": " + std::to_string(size) + " bytes at " +
                        std::to_string(source.first) + " for a payload of " +
                        std::to_string(entry.payload));
    }
    CheckPlace(source, batch.end);
    TakeChecksums(batch, *record, source);
    batch.Add(size, Kind::kPayload, record, source.data, source.first);
    record->given += size;
    if (record->given < entry.payload) continue;
    batch.Add(entry.tail, Kind::kTail, record, {});
    if (entry.payload == 0) PayloadDone(batch, *record, 0, {}, {});
    batch.records.push_back(std::move(open_));
  }
  Flush(batch, Flushing::kMoreFollows);
  for (const auto& record : batch.records) index_.Add(record->entry);
  position_ = batch.end;
  return places;
}

WrittenFile ShardFileWriter::Finish() {
  if (open_)
    throw base::Error(open_->name + ": the payload ends after " + std::to_string(open_->given) +
                      " bytes");
  const int64_t start = format::IndexStart(position_);
  const auto bytes = index_.Finish(save_id_, start);
  Batch batch;
  batch.end = position_;
  batch.Add(start - position_, Kind::kZeros, nullptr, {});
  batch.Add(static_cast<int64_t>(bytes.size()), Kind::kBytes, nullptr, bytes);
  Flush(batch, Flushing::kEnd);
  file_->Truncate(batch.end);  // a direct file's last block was written to its end; a reservation
                               // may have been longer
  if (options_.sync) file_->Sync();
  const WrittenFile result{batch.end, file_->direct()};
  file_->Close();
  finished_ = true;
  return result;
}

namespace {

// Bytes [begin, end) of a file, in blocks that end at multiples of the block's size.
struct BlockRange {
  int64_t begin;
  int64_t end;
  int64_t block;

  int64_t first() const { return begin / block; }
  size_t count() const {
    return static_cast<size_t>(end > begin ? (end - 1) / block - first() + 1 : 0);
  }
  int64_t BeginOf(size_t i) const {
    return std::max(begin, (first() + static_cast<int64_t>(i)) * block);
  }
  int64_t EndOf(size_t i) const {
    return std::min(end, (first() + static_cast<int64_t>(i) + 1) * block);
  }
};

constexpr auto kPage = static_cast<int64_t>(base::AlignedBuffer::kAlignment);

int64_t RoundUpToPage(int64_t size) { return (size + kPage - 1) / kPage * kPage; }

}  // namespace

void ShardFileWriter::Flush(Batch& batch, Flushing flushing) {
  const BlockRange range{flushed_, batch.end, static_cast<int64_t>(options_.block)};
  // A direct file is written in whole blocks: what is left over stays in memory until the next call
  // or the end.
  const bool carries = options_.direct && file_->direct() && flushing == Flushing::kMoreFollows;
  base::AlignedBuffer prefix = std::move(carry_);  // begins where the first block does
  const bool in_blocks = (options_.direct && file_->direct()) || prefix || range.begin < position_;
  base::ParallelFor(range.count(), options_.threads, [&](size_t i) {
    const int64_t from = range.BeginOf(i), to = range.EndOf(i);
    try {
      if (!in_blocks) {
        WriteBlockBuffered(batch, from, to);
      } else if (carries && to % range.block != 0) {
        KeepBlock(batch, from, to, i == 0 ? std::move(prefix) : base::AlignedBuffer());
      } else {
        WriteBlock(batch, from, to, i == 0 ? std::move(prefix) : base::AlignedBuffer());
      }
    } catch (...) {
      batch.Fail();
      throw;
    }
  });
  if (range.count() == 0) carry_ = std::move(prefix);
  flushed_ = carries ? range.end / range.block * range.block : range.end;
}

// Puts bytes [begin, end) of the file into one piece of memory: the image's, or a buffer's.
ShardFileWriter::AssembledBlock ShardFileWriter::AssembleBlock(Batch& batch, int64_t begin,
                                                               int64_t end,
                                                               base::AlignedBuffer prefix) {
  // What earlier calls left over is in the first block already.
  int64_t have = std::max(begin, position_);
  AssembledBlock block{std::move(prefix), {}};
  block.memory = block.buffer ? block.buffer.span() : InImage(begin, RoundUpToPage(end));
  if (block.memory.empty()) {
    block.buffer = TakeBuffer();
    block.memory = block.buffer.span();
    // Left over in the image, whose end is in the midst of this block.
    if (have > begin)
      std::memcpy(block.memory.data(), InImage(begin, have).data(),
                  static_cast<size_t>(have - begin));
  }
  for (auto extent = batch.ExtentAt(have); have < end; ++extent) {
    const int64_t to = std::min(end, extent->offset + extent->size);
    const auto at = static_cast<size_t>(have - begin);
    Assemble(batch, *extent, have, block.memory.subspan(at, static_cast<size_t>(to - have)));
    have = to;
  }
  return block;
}

// The file's last block by now, which is not full: it is written when more has come.
void ShardFileWriter::KeepBlock(Batch& batch, int64_t begin, int64_t end,
                                base::AlignedBuffer prefix) {
  carry_ = AssembleBlock(batch, begin, end, std::move(prefix)).buffer;
}

void ShardFileWriter::WriteBlock(Batch& batch, int64_t begin, int64_t end,
                                 base::AlignedBuffer prefix) {
  AssembledBlock block = AssembleBlock(batch, begin, end, std::move(prefix));
  int64_t size = end - begin;
  if (file_->direct() && size % kPage != 0) {  // the file's last block: nothing is behind it
    const int64_t whole = RoundUpToPage(size);
    std::memset(block.memory.data() + size, 0, static_cast<size_t>(whole - size));
    size = whole;
  }
  file_->WriteAt(block.memory.first(static_cast<size_t>(size)), begin);
  if (block.buffer) GiveBuffer(std::move(block.buffer));
}

void ShardFileWriter::WriteBlockBuffered(Batch& batch, int64_t begin, int64_t end) {
  const std::span<std::byte> image = InImage(begin, end);
  base::AlignedBuffer buffer = image.empty() ? TakeBuffer() : base::AlignedBuffer();
  int64_t gathered = begin;  // the buffer, or the image, holds the file's bytes from here ...
  int64_t have = begin;      // ... to here
  // A block of the buffer's size always fits: it starts where the buffer's bytes start or later.
  const auto memory = [&](int64_t from, int64_t to) {
    const int64_t at = image.empty() ? from - gathered : from - begin;
    return (image.empty() ? buffer.span() : image)
        .subspan(static_cast<size_t>(at), static_cast<size_t>(to - from));
  };
  const auto write_gathered = [&] {
    if (have > gathered) file_->WriteAt(memory(gathered, have), gathered);
    gathered = have;
  };
  for (auto extent = batch.ExtentAt(have); have < end; ++extent) {
    const int64_t to = std::min(end, extent->offset + extent->size);
    if (extent->kind == Kind::kPayload && to - have >= kGather) {
      write_gathered();
      WritePayload(batch, *extent, have, to);
      gathered = to;
    } else {
      Assemble(batch, *extent, have, memory(have, to));
    }
    have = to;
  }
  write_gathered();
  if (buffer) GiveBuffer(std::move(buffer));
}

// Writes bytes [from, to) of the file, of a payload, from where it is.
void ShardFileWriter::WritePayload(Batch& batch, const Extent& extent, int64_t from, int64_t to) {
  while (from < to) {
    const int64_t in_extent = from - extent.offset, in_payload = extent.first + in_extent;
    int64_t step = to - from;
    // Steps end where checksum blocks do, so that a step's checksum is a part of one block's.
    if (!extent.record->summed)
      step = std::min({step, kStep, base::kChecksumBlock - in_payload % base::kChecksumBlock});
    const auto piece =
        extent.bytes.subspan(static_cast<size_t>(in_extent), static_cast<size_t>(step));
    const uint32_t crc = extent.record->summed ? 0 : base::Crc32(piece);
    file_->WriteAt(piece, from);
    if (!extent.record->summed)
      PayloadDone(batch, *extent.record, in_payload, {&crc, 1}, {&step, 1});
    from += step;
  }
}

// Puts `target.size()` bytes of an extent, from file position `from` on, where they will be written
// from.
void ShardFileWriter::Assemble(Batch& batch, const Extent& extent, int64_t from,
                               std::span<std::byte> target) {
  const int64_t at = from - extent.offset;
  switch (extent.kind) {
    case Kind::kZeros:
      std::memset(target.data(), 0, target.size());
      return;
    case Kind::kHead:
    case Kind::kBytes:
      std::memcpy(target.data(), extent.bytes.data() + at, target.size());
      return;
    case Kind::kTail:
      WaitForTail(batch, *extent.record);
      std::memcpy(target.data(), extent.record->tail.data() + at, target.size());
      return;
    case Kind::kPayload:
      AssemblePayload(batch, extent, at, target);
      return;
  }
}

// Returns when the payload's checksum is known, and with it the tail.
void ShardFileWriter::WaitForTail(Batch& batch, const Record& record) const {
  std::unique_lock lock(batch.mutex);
  batch.tail_ready.wait(lock, [&] { return batch.failed || !record.tail.empty(); });
  // Never seen: the first error is thrown.
  if (batch.failed) throw base::Error(path_ + ": another worker failed");
}

// Copies a part of a payload, from byte `at` of the extent on, and sums it, unless it is there or
// is summed already.
void ShardFileWriter::AssemblePayload(Batch& batch, const Extent& extent, int64_t at,
                                      std::span<std::byte> target) {
  const auto payload = extent.bytes.subspan(static_cast<size_t>(at), target.size());
  const bool is_there = target.data() == payload.data();  // in the image
  if (extent.record->summed) {
    if (!is_there) std::memcpy(target.data(), payload.data(), payload.size());
    return;
  }
  std::vector<uint32_t> crcs;
  std::vector<int64_t> sizes;
  const auto size = static_cast<int64_t>(target.size());
  for (int64_t done = 0; done < size; done += sizes.back()) {
    const int64_t in_block = (extent.first + at + done) % base::kChecksumBlock;
    const int64_t step = std::min(size - done, base::kChecksumBlock - in_block);
    const auto source = payload.subspan(static_cast<size_t>(done), static_cast<size_t>(step));
    const auto there = target.subspan(static_cast<size_t>(done), static_cast<size_t>(step));
    crcs.push_back(is_there ? base::Crc32(source) : base::CopyAndCrc32(there, source));
    sizes.push_back(step);
  }
  PayloadDone(batch, *extent.record, extent.first + at, crcs, sizes);
}

// Notes the checksums of payload bytes from `from` on, in consecutive pieces; with the last ones
// the record's tail is made.
void ShardFileWriter::PayloadDone(Batch& batch, Record& record, int64_t from,
                                  std::span<const uint32_t> crcs, std::span<const int64_t> sizes) {
  const std::lock_guard lock(batch.mutex);
  for (size_t i = 0; i < crcs.size(); ++i) {
    record.parts.push_back({from, sizes[i], crcs[i]});
    record.remaining -= sizes[i];
    from += sizes[i];
  }
  if (record.remaining > 0) return;
  std::sort(record.parts.begin(), record.parts.end(),
            [](const auto& a, const auto& b) { return a.from < b.from; });
  format::IndexEntry& entry = record.entry;
  for (const Record::Part& part : record.parts) {
    if (part.from % base::kChecksumBlock == 0) {
      entry.block_crcs.push_back(part.crc);
    } else {
      entry.block_crcs.back() =
          base::Crc32Combine(entry.block_crcs.back(), part.crc, static_cast<uint64_t>(part.size));
    }
  }
  Complete(batch, record);
}

// The checksums of the payload's blocks are there: what follows from them.
void ShardFileWriter::Complete(Batch& batch, Record& record) {
  format::IndexEntry& entry = record.entry;
  int64_t at = 0;
  for (const uint32_t crc : entry.block_crcs) {
    const int64_t size = std::min(base::kChecksumBlock, entry.payload - at);
    entry.payload_crc = base::Crc32Combine(entry.payload_crc, crc, static_cast<uint64_t>(size));
    at += size;
  }
  if (entry.dtype != nullptr) {
    record.tail = format::EncodeRecordTail(*entry.dtype, entry.shape, entry.payload_crc);
    entry.framing_crc = base::Crc32(record.tail, entry.framing_crc);
    batch.tail_ready.notify_all();
  }
}

// A payload that was summed where it was copied into the image.
void ShardFileWriter::TakeChecksums(Batch& batch, Record& record, const RecordSource& source) {
  format::IndexEntry& entry = record.entry;
  const FileImage& image = options_.image;
  const bool whole = source.first == 0 &&
                     static_cast<int64_t>(source.data.size()) == entry.payload && entry.payload > 0;
  if (!whole || !image.checksums) return;
  const std::span<const uint32_t> known = image.checksums(source.data.data());
  if (known.empty()) return;
  if (static_cast<int64_t>(known.size()) !=
      (entry.payload + base::kChecksumBlock - 1) / base::kChecksumBlock) {
    throw base::Error(path_ + ": " + source.name + " has " + std::to_string(known.size()) +
                      " checksums");
  }
  entry.block_crcs.assign(known.begin(), known.end());
  record.summed = true;
  Complete(batch, record);
}

std::span<std::byte> ShardFileWriter::InImage(int64_t begin, int64_t end) const {
  const auto size = static_cast<int64_t>(options_.image.memory.size());
  const int64_t from = begin - options_.image.offset, to = end - options_.image.offset;
  if (from < 0 || to > size) return {};
  return options_.image.memory.subspan(static_cast<size_t>(from), static_cast<size_t>(to - from));
}

// Data that lies in the image must lie where the file has it: anywhere else it would be overwritten
// before it is read.
void ShardFileWriter::CheckPlace(const RecordSource& source, int64_t offset) const {
  const std::span<std::byte> image = options_.image.memory;
  const std::less<const std::byte*> before;
  const std::byte* begin = source.data.data();
  const std::byte* end = begin + source.data.size();
  if (source.data.empty() || !before(begin, image.data() + image.size()) ||
      !before(image.data(), end))
    return;
  if (before(begin, image.data()) || begin - image.data() != offset - options_.image.offset) {
    throw base::Error(path_ + ": " + source.name + " does not lie where the file's image has it");
  }
}

base::AlignedBuffer ShardFileWriter::TakeBuffer() {
  {
    const std::lock_guard lock(buffers_mutex_);
    if (!buffers_.empty()) {
      base::AlignedBuffer buffer = std::move(buffers_.back());
      buffers_.pop_back();
      return buffer;
    }
  }
  return base::AlignedBuffer(options_.block,
                             /*huge=*/options_.reserve >= static_cast<int64_t>(options_.block));
}

void ShardFileWriter::GiveBuffer(base::AlignedBuffer buffer) {
  const std::lock_guard lock(buffers_mutex_);
  buffers_.push_back(std::move(buffer));
}

}  // namespace hsdp_ckpt::checkpoint
