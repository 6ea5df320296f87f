// How a data file is written: in blocks, which are ranges of the file. What of which extents of a
// WriteBatch falls into a block is found by binary search.
#include "checkpoint/save/shard_file_writer.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <functional>
#include <utility>

#include "base/crc32.h"
#include "base/error.h"
#include "base/parallel.h"
#include "format/record.h"

namespace hsdp_ckpt::checkpoint {
namespace {

// Payload pieces of at least this size go from their own memory to a buffered file; smaller ones
// are gathered.
constexpr int64_t kGather = 64 << 10;
// A buffered write's step: summed, then copied by the kernel while it is still in the second-level
// cache.
constexpr int64_t kStep = 256 << 10;
constexpr auto kPage = static_cast<int64_t>(base::AlignedBuffer::kAlignment);

int64_t RoundUpToPage(int64_t size) { return (size + kPage - 1) / kPage * kPage; }

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

}  // namespace

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
ShardFileWriter::Place ShardFileWriter::Begin(WriteBatch& batch, const RecordSource& source) {
  open_ = std::make_unique<WriteBatch::Record>();
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
    entry.offset = format::RecordStart(batch.end(), size);
    open_->head = format::EncodeRecordHead(*source.dtype, source.shape);
  } else {
    entry.offset = batch.end();
  }
  if (begun_ < options_.owners.size()) {
    const bool is_object = options_.owners[begun_] == 0 && source.dtype == nullptr;
    entry.owner = is_object ? format::RecordOwner(source.name, {}) : options_.owners[begun_];
  }
  ++begun_;
  entry.framing_crc = base::Crc32(open_->head);
  open_->remaining = entry.payload;
  batch.AddZeros(entry.offset - batch.end());
  batch.AddHead(*open_);
  return {entry.offset, entry.length()};
}

// That a source is the next part of the payload that is open.
void ShardFileWriter::CheckContinues(const RecordSource& source) const {
  if (source.first == open_->given && source.name == open_->name) return;
  throw base::Error(source.name + ": a part of the payload at " + std::to_string(source.first) +
                    " where byte " + std::to_string(open_->given) + " of " + open_->name +
                    " has to follow");
}

// That the payload has room for a source.
void ShardFileWriter::CheckFits(const RecordSource& source) const {
  const auto size = static_cast<int64_t>(source.data.size());
  const int64_t payload = open_->entry.payload;
  const bool brings_nothing = size == 0 && payload > 0;
  if (source.first == open_->given && size <= payload - open_->given && !brings_nothing) return;
  throw base::Error(source.name + ": " + std::to_string(size) + " bytes at " +
                    std::to_string(source.first) + " for a payload of " + std::to_string(payload));
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

// Asks for the checksums of a payload that was summed where it was copied into the image.
void ShardFileWriter::TakeChecksums(WriteBatch& batch, const RecordSource& source) {
  const int64_t payload = open_->entry.payload;
  const bool whole =
      source.first == 0 && static_cast<int64_t>(source.data.size()) == payload && payload > 0;
  if (!whole || !options_.image.checksums) return;
  const std::span<const uint32_t> known = options_.image.checksums(source.data.data());
  if (known.empty()) return;
  const int64_t blocks = (payload + base::kChecksumBlock - 1) / base::kChecksumBlock;
  if (static_cast<int64_t>(known.size()) != blocks) {
    throw base::Error(path_ + ": " + source.name + " has " + std::to_string(known.size()) +
                      " checksums");
  }
  batch.SetChecksums(*open_, known);
}

std::vector<ShardFileWriter::Place> ShardFileWriter::Write(std::span<const RecordSource> sources) {
  WriteBatch batch(position_);
  std::vector<Place> places;
  for (const RecordSource& source : sources) {
    if (open_) {
      CheckContinues(source);
    } else {
      places.push_back(Begin(batch, source));
    }
    CheckFits(source);
    CheckPlace(source, batch.end());
    TakeChecksums(batch, source);
    batch.AddPayload(*open_, source.data, source.first);
    if (open_->given == open_->entry.payload) batch.AddTail(std::move(open_));
  }
  Flush(batch, Flushing::kMoreFollows);
  for (const auto& record : batch.complete_records()) index_.Add(record->entry);
  position_ = batch.end();
  return places;
}

WrittenFile ShardFileWriter::Finish() {
  if (open_)
    throw base::Error(open_->name + ": the payload ends after " + std::to_string(open_->given) +
                      " bytes");
  const int64_t start = format::IndexStart(position_);
  const auto index = index_.Finish(save_id_, start);
  WriteBatch batch(position_);
  batch.AddZeros(start - position_);
  batch.AddBytes(index);
  Flush(batch, Flushing::kEnd);
  // A direct file's last block was written to its end; a reservation may have been longer.
  file_->Truncate(batch.end());
  if (options_.sync) file_->Sync();
  const WrittenFile result{batch.end(), file_->direct()};
  file_->Close();
  finished_ = true;
  return result;
}

void ShardFileWriter::Flush(WriteBatch& batch, Flushing flushing) {
  const BlockRange range{flushed_, batch.end(), static_cast<int64_t>(options_.block)};
  const bool direct = options_.direct && file_->direct();
  // A direct file is written in whole blocks: what is left over stays in memory until the next call
  // or the end.
  const bool carries = direct && flushing == Flushing::kMoreFollows;
  base::AlignedBuffer prefix = std::move(carry_);  // begins where the first block does
  const bool in_blocks = direct || prefix || range.begin < position_;
  base::ParallelFor(range.count(), options_.threads, [&](size_t i) {
    const int64_t begin = range.BeginOf(i), end = range.EndOf(i);
    base::AlignedBuffer begun = i == 0 ? std::move(prefix) : base::AlignedBuffer();
    try {
      if (!in_blocks) {
        WriteBlockBuffered(batch, begin, end);
      } else if (carries && end % range.block != 0) {
        KeepBlock(batch, begin, end, std::move(begun));
      } else {
        WriteBlock(batch, begin, end, std::move(begun));
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
ShardFileWriter::AssembledBlock ShardFileWriter::AssembleBlock(WriteBatch& batch, int64_t begin,
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
    const int64_t to = std::min(end, extent->end());
    const auto at = static_cast<size_t>(have - begin);
    batch.Assemble(*extent, have, block.memory.subspan(at, static_cast<size_t>(to - have)));
    have = to;
  }
  return block;
}

// The file's last block by now, which is not full: it is written when more has come.
void ShardFileWriter::KeepBlock(WriteBatch& batch, int64_t begin, int64_t end,
                                base::AlignedBuffer prefix) {
  carry_ = AssembleBlock(batch, begin, end, std::move(prefix)).buffer;
}

void ShardFileWriter::WriteBlock(WriteBatch& batch, int64_t begin, int64_t end,
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

void ShardFileWriter::WriteBlockBuffered(WriteBatch& batch, int64_t begin, int64_t end) {
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
    const int64_t to = std::min(end, extent->end());
    if (extent->kind == WriteBatch::Kind::kPayload && to - have >= kGather) {
      write_gathered();
      WritePayload(batch, *extent, have, to);
      gathered = to;
    } else {
      batch.Assemble(*extent, have, memory(have, to));
    }
    have = to;
  }
  write_gathered();
  if (buffer) GiveBuffer(std::move(buffer));
}

// Writes bytes [from, to) of the file, of a payload, from where it is.
void ShardFileWriter::WritePayload(WriteBatch& batch, const WriteBatch::Extent& extent,
                                   int64_t from, int64_t to) {
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
      batch.AddChecksums(*extent.record, in_payload, {&crc, 1}, {&step, 1});
    from += step;
  }
}

std::span<std::byte> ShardFileWriter::InImage(int64_t begin, int64_t end) const {
  const auto size = static_cast<int64_t>(options_.image.memory.size());
  const int64_t from = begin - options_.image.offset, to = end - options_.image.offset;
  if (from < 0 || to > size) return {};
  return options_.image.memory.subspan(static_cast<size_t>(from), static_cast<size_t>(to - from));
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
