#include "checkpoint/save/write_batch.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/crc32.h"
#include "base/error.h"
#include "format/record.h"

namespace hsdp_ckpt::checkpoint {

// ---- extents

void WriteBatch::Add(int64_t size, Kind kind, Record* record, std::span<const std::byte> bytes,
                     int64_t first) {
  if (size > 0) extents_.push_back({end_, size, kind, record, bytes, first});
  end_ += size;
}

void WriteBatch::AddBytes(std::span<const std::byte> bytes) {
  Add(static_cast<int64_t>(bytes.size()), Kind::kBytes, nullptr, bytes);
}

void WriteBatch::AddHead(Record& record) {
  Add(record.entry.head, Kind::kHead, &record, record.head);
}

void WriteBatch::AddPayload(Record& record, std::span<const std::byte> bytes, int64_t first) {
  const auto size = static_cast<int64_t>(bytes.size());
  Add(size, Kind::kPayload, &record, bytes, first);
  record.given += size;
}

void WriteBatch::AddTail(std::unique_ptr<Record> record) {
  Add(record->entry.tail, Kind::kTail, record.get(), {});
  if (record->entry.payload == 0) Complete(*record);  // nobody sums it
  complete_records_.push_back(std::move(record));
}

WriteBatch::ExtentIterator WriteBatch::ExtentAt(int64_t at) const {
  return std::upper_bound(extents_.begin(), extents_.end(), at,
                          [](int64_t byte, const Extent& extent) { return byte < extent.end(); });
}

// ---- checksums

void WriteBatch::SetChecksums(Record& record, std::span<const uint32_t> block_crcs) {
  record.entry.block_crcs.assign(block_crcs.begin(), block_crcs.end());
  record.summed = true;
  Complete(record);
}

void WriteBatch::AddChecksums(Record& record, int64_t from, std::span<const uint32_t> crcs,
                              std::span<const int64_t> sizes) {
  const std::lock_guard lock(mutex_);
  for (size_t i = 0; i < crcs.size(); ++i) {
    record.parts.push_back({from, sizes[i], crcs[i]});
    record.remaining -= sizes[i];
    from += sizes[i];
  }
  if (record.remaining > 0) return;
  std::sort(record.parts.begin(), record.parts.end(),
            [](const auto& a, const auto& b) { return a.from < b.from; });
  std::vector<uint32_t>& block_crcs = record.entry.block_crcs;
  for (const Record::Part& part : record.parts) {
    if (part.from % base::kChecksumBlock == 0) {
      block_crcs.push_back(part.crc);
    } else {
      block_crcs.back() =
          base::Crc32Combine(block_crcs.back(), part.crc, static_cast<uint64_t>(part.size));
    }
  }
  Complete(record);
}

// The checksums of the payload's blocks are there: what follows from them.
void WriteBatch::Complete(Record& record) {
  format::IndexEntry& entry = record.entry;
  int64_t at = 0;
  for (const uint32_t crc : entry.block_crcs) {
    const int64_t size = std::min(base::kChecksumBlock, entry.payload - at);
    entry.payload_crc = base::Crc32Combine(entry.payload_crc, crc, static_cast<uint64_t>(size));
    at += size;
  }
  if (entry.dtype == nullptr) return;
  record.tail = format::EncodeRecordTail(*entry.dtype, entry.shape, entry.payload_crc);
  entry.framing_crc = base::Crc32(record.tail, entry.framing_crc);
  tail_ready_.notify_all();
}

void WriteBatch::Fail() {
  const std::lock_guard lock(mutex_);
  failed_ = true;
  tail_ready_.notify_all();
}

// Returns when the payload's checksum is known, and with it the tail.
void WriteBatch::WaitForTail(const Record& record) {
  std::unique_lock lock(mutex_);
  tail_ready_.wait(lock, [&] { return failed_ || !record.tail.empty(); });
  // Never seen: the first error is thrown.
  if (failed_) throw base::Error(record.name + ": another worker failed");
}

// ---- bytes

void WriteBatch::Assemble(const Extent& extent, int64_t from, std::span<std::byte> target) {
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
      WaitForTail(*extent.record);
      std::memcpy(target.data(), extent.record->tail.data() + at, target.size());
      return;
    case Kind::kPayload:
      AssemblePayload(extent, at, target);
      return;
  }
}

// Copies a part of a payload, from byte `at` of the extent on, and sums it, unless it is there or
// is summed already.
void WriteBatch::AssemblePayload(const Extent& extent, int64_t at, std::span<std::byte> target) {
  const auto payload = extent.bytes.subspan(static_cast<size_t>(at), target.size());
  const bool is_there = target.data() == payload.data();  // in the file's image
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
  AddChecksums(*extent.record, extent.first + at, crcs, sizes);
}

}  // namespace hsdp_ckpt::checkpoint
