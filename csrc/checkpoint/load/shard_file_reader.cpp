#include "checkpoint/load/shard_file_reader.h"

#include <algorithm>

#include "base/crc32.h"
#include "base/error.h"
#include "format/metadata.h"

namespace hsdp_ckpt::checkpoint {
namespace {

// Ranges without a checksum of their own are cut at this size.
constexpr int64_t kPart = int64_t{1} << 20;

// Opened through the directory, from which no name and no link may lead.
io::File OpenData(io::FileSystem& fs, const std::string& directory, const std::string& name) {
  if (!format::IsInsideDirectory(name))
    throw base::Error(directory + ": names a file outside the checkpoint's directory: " + name);
  try {
    return io::File::OpenInside(fs, directory, name, io::OpenMode::kRead);
  } catch (const base::IoError& error) {
    if (error.error_number() == ELOOP)
      throw base::Error(error.path() +
                        ": a link that leads out of the checkpoint's directory is not followed");
    throw;
  }
}

// Sets which part of a segment that holds payload bytes [begin, end) goes to the read's target, and
// where.
void SetTarget(const PayloadRead& read, int64_t begin, int64_t end, Segment& segment,
               int64_t payload_in_segment = 0) {
  const int64_t from = std::max(begin, read.first);
  const int64_t to = std::min(end, read.first + read.size);
  if (from >= to || read.target == nullptr) return;
  segment.from = static_cast<uint32_t>(payload_in_segment + from - begin);
  segment.to = static_cast<uint32_t>(payload_in_segment + to - begin);
  segment.target = read.target + (from - read.first);
}

}  // namespace

ShardFileReader::ShardFileReader(io::FileSystem& fs, const std::string& directory,
                                 const std::string& name, bool direct)
    : file_(OpenData(fs, directory, name)), size_(file_.Size()) {
  try {
    if (direct) direct_ = io::File::OpenInside(fs, directory, name, io::OpenMode::kReadDirect);
  } catch (const base::IoError& error) {
    if (error.error_number() != EINVAL && error.error_number() != EOPNOTSUPP) throw;
  }
  // Somebody may have put another file there in between.
  if (direct_ && !direct_->IsSame(file_)) direct_.reset();
  ReadIndex(name);
}

// Leaves `index_` empty for a stock file, which has none.
void ShardFileReader::ReadIndex(const std::string& name) {
  const std::string what = "the index at the file's end";
  const auto parsed = format::DataFileName::Parse(name);
  const bool ours = parsed && !parsed->by_torch;
  std::vector<std::byte> tail(static_cast<size_t>(std::min(size_, format::kIndexTail)));
  file_.ReadAt(tail, size_ - static_cast<int64_t>(tail.size()), what);
  if (!ours && !format::HasIndexMagic(tail)) return;
  const format::IndexPlace place = format::DecodeIndexTail(tail, size_, file_.path());
  if (ours && place.save_id != parsed->save_id) {
    throw base::CorruptionError(file_.path(), what, "the save id in the file's name",
                                "another save's");
  }
  io::CheckNotHoles(file_, place.size, what);
  std::vector<std::byte> bytes(static_cast<size_t>(place.size));
  file_.ReadAt(bytes, place.offset, what);
  index_ = format::DecodeIndex(bytes, place, file_.path());
  records_end_ = place.offset;
}

const format::IndexEntry& ShardFileReader::Find(const std::string& name, int64_t offset,
                                                int64_t length, uint32_t owner) const {
  const auto& entries = index_->entries;
  // An empty object and the record after it share an offset; the length tells them apart.
  auto found =
      std::lower_bound(entries.begin(), entries.end(), offset,
                       [](const format::IndexEntry& e, int64_t at) { return e.offset < at; });
  while (found != entries.end() && found->offset == offset && found->length() != length) ++found;
  if (found == entries.end() || found->offset != offset) {
    throw base::CorruptionError(
        file_.path(), name,
        "a record of " + std::to_string(length) + " bytes at offset " + std::to_string(offset),
        "an index without it");
  }
  if (owner != 0 && found->owner != 0 && owner != found->owner) {
    throw base::CorruptionError(file_.path(), name,
                                "its record at offset " + std::to_string(offset),
                                "the record of another tensor, chunk or object (has a data file "
                                "of the checkpoint been renamed?)");
  }
  return *found;
}

void ShardFileReader::CheckRange(const std::string& name, int64_t offset, int64_t length) const {
  if (offset < 0 || length < 0 || offset > size_ || length > size_ - offset) {
    throw base::CorruptionError(
        file_.path(), name, std::to_string(length) + " bytes at offset " + std::to_string(offset),
        "a file of " + std::to_string(size_) + " bytes");
  }
}

std::optional<format::TensorDescription> ShardFileReader::Describe(const std::string& name,
                                                                   int64_t offset, int64_t length,
                                                                   uint32_t owner) {
  if (index_) {
    const format::IndexEntry& entry = Find(name, offset, length, owner);
    if (entry.dtype == nullptr) return std::nullopt;
    return format::ContiguousTensor(*entry.dtype, entry.shape);
  }
  CheckRange(name, offset, length);
  const auto key = std::pair(offset, length);
  auto found = stock_.find(key);
  if (found == stock_.end())
    found = stock_.emplace(key, OpenStockRecord(file_, name, offset, length)).first;
  return found->second.tensor;
}

std::vector<std::byte> ShardFileReader::ReadBytes(const std::string& name, int64_t offset,
                                                  int64_t length, uint32_t owner) const {
  if (!index_) {
    CheckRange(name, offset, length);
    io::CheckNotHoles(file_, length, name);
    return ReadStockBytes(file_, name, offset, length);
  }
  const format::IndexEntry& entry = Find(name, offset, length, owner);
  io::CheckNotHoles(file_, length, name);
  if (entry.dtype != nullptr)
    throw base::CorruptionError(file_.path(), name, "an object", "a tensor");
  return ReadObject(entry, name);
}

std::vector<std::byte> ShardFileReader::ReadObject(const format::IndexEntry& entry,
                                                   const std::string& name) const {
  const auto [begin, end] = WithPadding(entry);
  std::vector<std::byte> bytes(static_cast<size_t>(end - begin));
  file_.ReadAt(bytes, begin, name);
  const std::span<const std::byte> all(bytes);
  const auto before = static_cast<size_t>(entry.offset - begin);
  const auto size = static_cast<size_t>(entry.payload);
  const uint32_t crc = base::Crc32(all.subspan(before, size));
  if (crc != entry.payload_crc)
    throw base::CorruptionError(file_.path(), name, base::CrcText(entry.payload_crc),
                                base::CrcText(crc));
  for (const auto padding : {all.first(before), all.subspan(before + size)}) {
    if (std::any_of(padding.begin(), padding.end(), [](std::byte b) { return b != std::byte{0}; }))
      throw base::CorruptionError(file_.path(), name, "padding of zeros around it", "other bytes");
  }
  bytes.erase(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(before));
  bytes.resize(size);
  return bytes;
}

// A record's range, the padding before it and, of the last one, that behind it.
std::pair<int64_t, int64_t> ShardFileReader::WithPadding(const format::IndexEntry& entry) const {
  const auto at = static_cast<size_t>(&entry - index_->entries.data());
  return {at == 0 ? 0 : index_->entries[at - 1].end(),
          at + 1 == index_->entries.size() ? records_end_ : entry.end()};
}

void ShardFileReader::CutPadding(const format::IndexEntry& entry, uint32_t number,
                                 SegmentList& out) const {
  const auto zeros = [&](int64_t begin, int64_t end) {
    for (; begin < end; begin += kPart) {
      out.segments.push_back({.begin = begin,
                              .end = std::min(begin + kPart, end),
                              .read = number,
                              .kind = Segment::Kind::kZeros});
    }
  };
  const auto [begin, end] = WithPadding(entry);
  zeros(begin, entry.offset);
  zeros(entry.end(), end);
}

void ShardFileReader::Cut(const PayloadRead& read, uint32_t number, bool same_record,
                          SegmentList& out) const {
  if (!index_) return CutStock(read, number, out);
  const format::IndexEntry& entry = Find(read.name, read.offset, read.length);
  if (!same_record) CutPadding(entry, number, out);
  if (entry.dtype != nullptr && entry.payload <= base::kChecksumBlock) {
    Segment segment{.begin = entry.offset,
                    .end = entry.end(),
                    .entry = &entry,
                    .read = number,
                    .kind = Segment::Kind::kRecord};
    SetTarget(read, 0, entry.payload, segment, entry.head);
    out.segments.push_back(segment);
    return;
  }
  if (!same_record && entry.dtype != nullptr) CutFraming(entry, number, out);
  CutBlocks(entry, read, number, out);
}

// The header before a record's payload and what is behind it: two ranges that share a checksum.
void ShardFileReader::CutFraming(const format::IndexEntry& entry, uint32_t number,
                                 SegmentList& out) {
  const int64_t payload = entry.offset + entry.head;
  const auto group = static_cast<uint32_t>(out.groups.size());
  out.groups.push_back({entry.framing_crc, number});
  const auto part = [&](int64_t begin, int64_t end) {
    out.segments.push_back(
        {.begin = begin, .end = end, .crc = group, .read = number, .kind = Segment::Kind::kPart});
  };
  part(entry.offset, payload);
  part(payload + entry.payload, entry.end());
}

// The blocks of a payload that hold what `read` wants, each with a checksum of its own.
void ShardFileReader::CutBlocks(const format::IndexEntry& entry, const PayloadRead& read,
                                uint32_t number, SegmentList& out) {
  if (read.size == 0) return;
  const int64_t payload = entry.offset + entry.head;
  const int64_t last = (read.first + read.size - 1) / base::kChecksumBlock;
  for (int64_t block = read.first / base::kChecksumBlock; block <= last; ++block) {
    const int64_t begin = block * base::kChecksumBlock;
    const int64_t end = std::min(begin + base::kChecksumBlock, entry.payload);
    Segment segment{.begin = payload + begin,
                    .end = payload + end,
                    .crc = entry.block_crcs[static_cast<size_t>(block)],
                    .read = number};
    SetTarget(read, begin, end, segment);
    out.segments.push_back(segment);
  }
}

// A stock record has one checksum for the payload: all of it is read.
void ShardFileReader::CutStock(const PayloadRead& read, uint32_t number, SegmentList& out) const {
  const StockRecord& record = stock_.at({read.offset, read.length});
  const auto total = static_cast<int64_t>(record.payload.size);
  const auto payload = read.offset + static_cast<int64_t>(record.payload.data_offset);
  const bool one = total <= kPart;
  if (total == 0 && record.payload.crc != 0)
    throw base::CorruptionError(file_.path(), read.name, base::CrcText(record.payload.crc),
                                base::CrcText(0));
  if (!one) out.groups.push_back({record.payload.crc, number});
  for (int64_t begin = 0; begin < total; begin += kPart) {
    const int64_t end = std::min(begin + kPart, total);
    Segment segment{.begin = payload + begin,
                    .end = payload + end,
                    .crc = one ? record.payload.crc : static_cast<uint32_t>(out.groups.size() - 1),
                    .read = number,
                    .kind = one ? Segment::Kind::kBlock : Segment::Kind::kPart};
    SetTarget(read, begin, end, segment);
    out.segments.push_back(segment);
  }
}

}  // namespace hsdp_ckpt::checkpoint
