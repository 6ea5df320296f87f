#include "format/file_index.h"

#include <algorithm>

#include "base/bytes.h"
#include "base/crc32.h"
#include "base/error.h"
#include "format/record.h"
#include "format/tensor_pickle.h"

namespace hsdp_ckpt::format {
namespace {

constexpr std::string_view kMagic = "HSDPCKPT";
constexpr uint32_t kVersion = 2;
constexpr uint32_t kWithoutOwners = 1;  // the version before, which is read all the same
constexpr size_t kEntryFixed = 40;      // bytes of an entry without shape and block checksums
constexpr size_t kEntryFixedWithoutOwner = 36;
constexpr size_t kTailCrcAt = 52;  // the tail's own checksum covers what stands before it

uint64_t Blocks(uint64_t payload) {
  return payload / base::kChecksumBlock + (payload % base::kChecksumBlock != 0);
}

// That a record lies between the one before it, which ends at `begin`, and the index.
void CheckPlace(const base::ByteReader& in, uint64_t offset, uint64_t payload, uint64_t framing,
                uint64_t begin, uint64_t limit) {
  // In this order, so that no difference can wrap around.
  const bool fits = offset >= begin && offset <= limit && payload <= limit - offset &&
                    framing <= limit - offset - payload;
  if (fits) return;
  in.Fail("records one after the other before the index",
          "one at " + std::to_string(offset) + " of " + std::to_string(payload));
}

std::vector<int64_t> DecodeShape(base::ByteReader& in, uint8_t dimensions) {
  std::vector<int64_t> shape;
  for (int i = 0; i < dimensions; ++i) {
    const auto size = in.Get<uint64_t>();
    if (size > INT64_MAX) in.Fail("a size below 2**63", std::to_string(size));
    shape.push_back(static_cast<int64_t>(size));
  }
  return shape;
}

RecordSize SizeOfDecoded(const base::ByteReader& in, const IndexEntry& entry) {
  try {
    return SizeOfRecord(*entry.dtype, entry.shape);
  } catch (const base::Error& error) {
    in.Fail("a shape that fits into memory", error.what());
  }
}

// Sets the dtype, and checks that head, payload and tail are as long as it and the shape make them.
void DecodeDtype(const base::ByteReader& in, uint8_t code, IndexEntry& entry) {
  if (code == 0) {
    if (entry.head != 0 || entry.tail != 0 || !entry.shape.empty())
      in.Fail("an object without framing", "one with");
    return;
  }
  entry.dtype = FindRecordDtype(code);
  if (entry.dtype == nullptr) in.Fail("a dtype of this version", "code " + std::to_string(code));
  const RecordSize size = SizeOfDecoded(in, entry);
  if (size.payload != entry.payload || size.head != entry.head || size.tail != entry.tail) {
    in.Fail("a record as long as its dtype and shape make it",
            std::to_string(entry.length()) + " bytes");
  }
}

void DecodeBlockCrcs(base::ByteReader& in, IndexEntry& entry) {
  const uint64_t blocks = Blocks(static_cast<uint64_t>(entry.payload));
  if (blocks == 1) entry.block_crcs.push_back(entry.payload_crc);  // the payload's own
  if (blocks <= 1) return;
  if (blocks > in.remaining() / 4)
    in.Fail(std::to_string(blocks) + " block checksums", "a shorter index");
  for (uint64_t i = 0; i < blocks; ++i) entry.block_crcs.push_back(in.Get<uint32_t>());
}

IndexEntry DecodeEntry(base::ByteReader& in, int64_t begin, int64_t limit, uint32_t version) {
  IndexEntry entry;
  const auto offset = in.Get<uint64_t>(), payload = in.Get<uint64_t>();
  const uint64_t head = in.Get<uint32_t>(), tail = in.Get<uint32_t>();
  const auto code = in.Get<uint8_t>(), dimensions = in.Get<uint8_t>();
  if (in.Get<uint16_t>() != 0) in.Fail("zeros in a reserved field", "others");
  entry.framing_crc = in.Get<uint32_t>();
  entry.payload_crc = in.Get<uint32_t>();
  if (version != kWithoutOwners) entry.owner = in.Get<uint32_t>();
  CheckPlace(in, offset, payload, head + tail, static_cast<uint64_t>(begin),
             static_cast<uint64_t>(limit));
  entry.offset = static_cast<int64_t>(offset);
  entry.head = static_cast<int64_t>(head);
  entry.payload = static_cast<int64_t>(payload);
  entry.tail = static_cast<int64_t>(tail);
  entry.shape = DecodeShape(in, dimensions);
  DecodeDtype(in, code, entry);
  DecodeBlockCrcs(in, entry);
  return entry;
}

}  // namespace

uint32_t RecordOwner(std::string_view name, std::span<const int64_t> chunk) {
  const std::byte end_of_name{0};
  const uint32_t crc = base::Crc32({&end_of_name, 1}, base::Crc32(base::AsBytes(name)));
  return std::max(base::Crc32(std::as_bytes(chunk), crc), uint32_t{1});
}

int64_t IndexEntrySize(int64_t payload, size_t dimensions) {
  const uint64_t blocks = Blocks(static_cast<uint64_t>(payload));
  return static_cast<int64_t>(kEntryFixed + 8 * dimensions + (blocks > 1 ? 4 * blocks : 0));
}

void IndexEncoder::Add(const IndexEntry& entry) {
  ++entries_;
  out_.Put(static_cast<uint64_t>(entry.offset));
  out_.Put(static_cast<uint64_t>(entry.payload));
  out_.Put(static_cast<uint32_t>(entry.head));
  out_.Put(static_cast<uint32_t>(entry.tail));
  out_.Put(entry.dtype == nullptr ? uint8_t{0} : entry.dtype->code);
  out_.Put(static_cast<uint8_t>(entry.shape.size()));
  out_.Put(uint16_t{0});
  out_.Put(entry.framing_crc);
  out_.Put(entry.payload_crc);
  out_.Put(entry.owner);
  for (const int64_t size : entry.shape) out_.Put(static_cast<uint64_t>(size));
  if (entry.block_crcs.size() > 1) {
    for (const uint32_t crc : entry.block_crcs) out_.Put(crc);
  }
}

std::vector<std::byte> IndexEncoder::Finish(uint64_t save_id, int64_t index_offset) {
  const uint32_t crc = base::Crc32(out_.bytes());
  const uint64_t size = out_.size();
  base::ByteWriter tail;
  tail.Put(static_cast<uint64_t>(index_offset) + size + kIndexTail);  // the whole file's length
  tail.Put(static_cast<uint64_t>(index_offset));
  tail.Put(size);
  tail.Put(entries_);
  tail.Put(save_id);
  tail.Put(kVersion);
  tail.Put(static_cast<uint32_t>(base::kChecksumBlock));
  tail.Put(crc);
  tail.Put(base::Crc32(tail.bytes()));
  tail.Put(kMagic);
  out_.Put(tail.bytes());
  return out_.Take();
}

bool HasIndexMagic(std::span<const std::byte> tail) {
  return tail.size() >= kMagic.size() && base::AsText(tail.last(kMagic.size())) == kMagic;
}

IndexPlace DecodeIndexTail(std::span<const std::byte> tail, int64_t file_size,
                           const std::string& path) {
  base::ByteReader in(tail, path, "the index at the file's end");
  if (tail.size() != kIndexTail || !HasIndexMagic(tail))
    in.Fail("our index", "a file that is cut short or is another's");
  const auto length = in.Get<uint64_t>();
  IndexPlace place;
  const auto offset = in.Get<uint64_t>(), size = in.Get<uint64_t>();
  place.records = in.Get<uint64_t>();
  place.save_id = in.Get<uint64_t>();
  place.version = in.Get<uint32_t>();
  const auto block = in.Get<uint32_t>();
  place.crc = in.Get<uint32_t>();
  const auto crc = in.Get<uint32_t>();
  const uint32_t actual = base::Crc32(tail.first(kTailCrcAt));
  if (crc != actual) in.Fail(base::CrcText(crc), base::CrcText(actual));
  const bool known = place.version == kVersion || place.version == kWithoutOwners;
  if (!known || block != base::kChecksumBlock)
    in.Fail("format version 1 or 2", "version " + std::to_string(place.version));
  const size_t entry = place.version == kWithoutOwners ? kEntryFixedWithoutOwner : kEntryFixed;
  const auto total = static_cast<uint64_t>(file_size);
  if (length != total)
    in.Fail("a file of " + std::to_string(length) + " bytes", std::to_string(file_size));
  if (offset > total || size > total - offset || total - offset - size != kIndexTail ||
      place.records > size / entry) {
    in.Fail("an index that ends where the tail begins",
            std::to_string(size) + " bytes at " + std::to_string(offset));
  }
  place.offset = static_cast<int64_t>(offset);
  place.size = static_cast<int64_t>(size);
  return place;
}

FileIndex DecodeIndex(std::span<const std::byte> bytes, const IndexPlace& place,
                      const std::string& path) {
  base::ByteReader in(bytes, path, "the index at the file's end");
  const uint32_t actual = base::Crc32(bytes);
  if (actual != place.crc) in.Fail(base::CrcText(place.crc), base::CrcText(actual));
  FileIndex index;
  index.save_id = place.save_id;
  int64_t begin = 0;
  for (uint64_t i = 0; i < place.records; ++i) {
    index.entries.push_back(DecodeEntry(in, begin, place.offset, place.version));
    begin = index.entries.back().end();
  }
  if (in.remaining() != 0) in.Fail(std::to_string(place.records) + " entries", "more bytes");
  return index;
}

}  // namespace hsdp_ckpt::format
