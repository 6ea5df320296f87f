#include "checkpoint/shard_file_reader.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <set>

#include "base/crc32.h"
#include "base/error.h"
#include "base/parallel.h"
#include "record/record.h"

namespace hsdp_ckpt {
namespace {

// Records up to this size are read whole, neighbours together, up to kGroup bytes in one call.
constexpr int64_t kSmallRecord = 256 << 10;
constexpr int64_t kGroup = 1 << 20;
constexpr int64_t kGroupGap = 64 << 10;
// Checksum blocks of a larger record that one worker takes at a time.
constexpr size_t kBlocksPerPiece = 4;

int64_t BlockSize(const IndexEntry& entry, size_t block) {
  return std::min(kChecksumBlock, entry.payload - static_cast<int64_t>(block) * kChecksumBlock);
}

std::string Hex(uint32_t crc) {
  char text[16];
  std::snprintf(text, sizeof(text), "CRC %08x", crc);
  return text;
}

}  // namespace

ShardFileReader::ShardFileReader(FileSystem& fs, const std::string& directory, const std::string& name)
    : file_(File::Open(fs, JoinPath(directory, name), OpenMode::kRead)), size_(file_.Size()) {
  const auto parsed = DataFileName::Parse(name);
  const bool ours = parsed && !parsed->by_torch;
  std::vector<std::byte> tail(static_cast<size_t>(std::min(size_, kIndexTail)));
  file_.ReadAt(tail, size_ - static_cast<int64_t>(tail.size()), "the index at the file's end");
  if (!ours && !HasIndexMagic(tail)) return;
  const IndexPlace place = DecodeIndexTail(tail, size_, file_.path());
  if (ours && place.save_id != parsed->save_id) {
    throw CorruptionError(file_.path(), "the index at the file's end", "the save id in the file's name", "another save's");
  }
  std::vector<std::byte> bytes(static_cast<size_t>(place.size));
  file_.ReadAt(bytes, place.offset, "the index at the file's end");
  index_ = DecodeIndex(bytes, place, file_.path());
}

const IndexEntry& ShardFileReader::Find(const std::string& name, int64_t offset, int64_t length) const {
  const auto& entries = index_->entries;
  // An empty object and the record after it share an offset; the length tells them apart.
  auto found = std::lower_bound(entries.begin(), entries.end(), offset,
                                [](const IndexEntry& e, int64_t at) { return e.offset < at; });
  while (found != entries.end() && found->offset == offset && found->length() != length) ++found;
  if (found == entries.end() || found->offset != offset) {
    throw CorruptionError(file_.path(), name,
                          "a record of " + std::to_string(length) + " bytes at offset " + std::to_string(offset),
                          "an index without it");
  }
  return *found;
}

std::optional<TensorDescription> ShardFileReader::Describe(const std::string& name, int64_t offset, int64_t length) {
  if (index_) {
    const IndexEntry& entry = Find(name, offset, length);
    if (entry.dtype == nullptr) return std::nullopt;
    return ContiguousTensor(*entry.dtype, entry.shape);
  }
  if (offset < 0 || length < 0 || offset > size_ || length > size_ - offset) {
    throw CorruptionError(file_.path(), name, std::to_string(length) + " bytes at offset " + std::to_string(offset),
                          "a file of " + std::to_string(size_) + " bytes");
  }
  const auto key = std::pair(offset, length);
  auto found = stock_.find(key);
  if (found == stock_.end()) found = stock_.emplace(key, OpenStockRecord(file_, name, offset, length)).first;
  return found->second.tensor;
}

std::vector<std::byte> ShardFileReader::ReadBytes(const std::string& name, int64_t offset, int64_t length) {
  if (!index_) {
    Describe(name, offset, length);
    return ReadStockBytes(file_, name, offset, length);
  }
  const IndexEntry& entry = Find(name, offset, length);
  if (entry.dtype != nullptr) throw CorruptionError(file_.path(), name, "an object", "a tensor");
  std::vector<std::byte> bytes(static_cast<size_t>(entry.payload));
  file_.ReadAt(bytes, entry.offset, name);
  const uint32_t crc = Crc32(bytes);
  if (crc != entry.payload_crc) throw CorruptionError(file_.path(), name, Hex(entry.payload_crc), Hex(crc));
  return bytes;
}

void ShardFileReader::CheckFraming(const IndexEntry& entry, std::span<const std::byte> head,
                                   std::span<const std::byte> tail, const std::string& name) const {
  const uint32_t crc = Crc32(tail, Crc32(head));
  if (crc != entry.framing_crc) {
    throw CorruptionError(file_.path(), name + " (framing)", Hex(entry.framing_crc), Hex(crc));
  }
}

// Head and tail of a record whose payload is read in blocks.
void ShardFileReader::ReadFraming(const IndexEntry& entry, const std::string& name) const {
  std::vector<std::byte> head(static_cast<size_t>(entry.head)), tail(static_cast<size_t>(entry.tail));
  file_.ReadAt(head, entry.offset, name);
  file_.ReadAt(tail, entry.end() - entry.tail, name);
  CheckFraming(entry, head, tail, name);
}

// Blocks [first, last) of the payload: straight into the target, or through a scratch block where only a part is wanted.
void ShardFileReader::ReadBlocks(const IndexEntry& entry, const PayloadRead& read, size_t first_block,
                                 size_t last_block) const {
  std::vector<std::byte> scratch;
  const auto wanted_end = read.first + static_cast<int64_t>(read.target.size());
  for (size_t block = first_block; block < last_block; ++block) {
    const int64_t begin = static_cast<int64_t>(block) * kChecksumBlock;
    const int64_t size = BlockSize(entry, block);
    const bool whole = begin >= read.first && begin + size <= wanted_end;
    std::span<std::byte> bytes;
    if (whole) {
      bytes = read.target.subspan(static_cast<size_t>(begin - read.first), static_cast<size_t>(size));
    } else {
      scratch.resize(static_cast<size_t>(size));
      bytes = scratch;
    }
    file_.ReadAt(bytes, entry.offset + entry.head + begin, read.name);
    const uint32_t crc = Crc32(bytes);
    if (crc != entry.block_crcs[block]) {
      throw CorruptionError(file_.path(),
                            read.name + " (bytes " + std::to_string(begin) + " to " + std::to_string(begin + size) + ")",
                            Hex(entry.block_crcs[block]), Hex(crc));
    }
    if (!whole) {
      const int64_t from = std::max(begin, read.first), to = std::min(begin + size, wanted_end);
      std::memcpy(read.target.data() + (from - read.first), scratch.data() + (from - begin),
                  static_cast<size_t>(to - from));
    }
  }
}

// Neighbouring small records in one read: framing, payloads and what lies between them.
void ShardFileReader::ReadSmall(std::span<const PayloadRead* const> group) const {
  const int64_t begin = group.front()->offset;
  const int64_t end = group.back()->offset + group.back()->length;
  std::vector<std::byte> bytes(static_cast<size_t>(end - begin));
  file_.ReadAt(bytes, begin, group.front()->name);
  for (const PayloadRead* read : group) {
    const IndexEntry& entry = Find(read->name, read->offset, read->length);
    const auto record =
        std::span(bytes).subspan(static_cast<size_t>(entry.offset - begin), static_cast<size_t>(entry.length()));
    const auto payload = record.subspan(static_cast<size_t>(entry.head), static_cast<size_t>(entry.payload));
    CheckFraming(entry, record.first(static_cast<size_t>(entry.head)), record.last(static_cast<size_t>(entry.tail)),
                 read->name);
    const uint32_t crc = Crc32(payload);
    if (crc != entry.payload_crc) throw CorruptionError(file_.path(), read->name, Hex(entry.payload_crc), Hex(crc));
    if (!read->target.empty()) std::memcpy(read->target.data(), payload.data() + read->first, read->target.size());
  }
}

// A stock record has one checksum for the payload: all of it is read, the wanted part straight into its place.
void ShardFileReader::ReadStock(const PayloadRead& read, int threads) const {
  const StockRecord& record = stock_.at({read.offset, read.length});
  const auto total = static_cast<int64_t>(record.payload.size);
  const auto start = read.offset + static_cast<int64_t>(record.payload.data_offset);
  const auto wanted_end = read.first + static_cast<int64_t>(read.target.size());
  // Cut where the wanted part begins and ends, and every megabyte.
  std::vector<int64_t> cuts{0};
  while (cuts.back() < total) {
    int64_t next = std::min(cuts.back() + kChecksumBlock, total);
    for (const int64_t edge : {read.first, wanted_end}) {
      if (edge > cuts.back() && edge < next) next = edge;
    }
    cuts.push_back(next);
  }
  std::vector<uint32_t> crcs(cuts.size() - 1);
  ParallelFor(crcs.size(), threads, [&](size_t i) {
    const auto size = static_cast<size_t>(cuts[i + 1] - cuts[i]);
    std::vector<std::byte> scratch;
    std::span<std::byte> bytes;
    if (cuts[i] >= read.first && cuts[i + 1] <= wanted_end) {
      bytes = read.target.subspan(static_cast<size_t>(cuts[i] - read.first), size);
    } else {
      scratch.resize(size);
      bytes = scratch;
    }
    file_.ReadAt(bytes, start + cuts[i], read.name);
    crcs[i] = Crc32(bytes);
  });
  uint32_t crc = 0;
  for (size_t i = 0; i < crcs.size(); ++i) crc = Crc32Combine(crc, crcs[i], static_cast<uint64_t>(cuts[i + 1] - cuts[i]));
  if (crc != record.payload.crc) throw CorruptionError(file_.path(), read.name, Hex(record.payload.crc), Hex(crc));
}

void ShardFileReader::Read(std::span<const PayloadRead> reads, int threads) {
  for (const PayloadRead& read : reads) {
    const auto tensor = Describe(read.name, read.offset, read.length);
    const auto size = static_cast<int64_t>(read.target.size());
    if (!tensor || read.first < 0 || read.first > tensor->storage_bytes || size > tensor->storage_bytes - read.first) {
      throw Error(file_.path() + ": " + read.name + ": " + std::to_string(size) + " bytes from " +
                  std::to_string(read.first) + " are not in its payload");
    }
  }
  if (!index_) {
    for (const PayloadRead& read : reads) ReadStock(read, threads);
    return;
  }
  std::vector<const PayloadRead*> order;
  for (const PayloadRead& read : reads) order.push_back(&read);
  std::stable_sort(order.begin(), order.end(), [](auto* a, auto* b) { return a->offset < b->offset; });

  // One job a group of small records, a piece of a large one, or a large one's framing; in file order.
  std::vector<std::function<void()>> jobs;
  std::set<int64_t> framed;
  for (size_t i = 0; i < order.size();) {
    const PayloadRead& read = *order[i];
    const IndexEntry& entry = Find(read.name, read.offset, read.length);
    if (read.length <= kSmallRecord) {
      size_t j = i + 1;
      int64_t end = read.offset + read.length;
      while (j < order.size() && order[j]->length <= kSmallRecord && order[j]->offset - end <= kGroupGap &&
             order[j]->offset + order[j]->length - read.offset <= kGroup) {
        end = order[j]->offset + order[j]->length;
        ++j;
      }
      jobs.push_back([this, group = std::span(order).subspan(i, j - i)] { ReadSmall(group); });
      i = j;
      continue;
    }
    if (framed.insert(entry.offset).second) jobs.push_back([this, &entry, &read] { ReadFraming(entry, read.name); });
    if (!read.target.empty()) {
      const auto first = static_cast<size_t>(read.first / kChecksumBlock);
      const auto last =
          static_cast<size_t>((read.first + static_cast<int64_t>(read.target.size()) - 1) / kChecksumBlock) + 1;
      for (size_t block = first; block < last; block += kBlocksPerPiece) {
        const size_t to = std::min(last, block + kBlocksPerPiece);
        jobs.push_back([this, &entry, &read, block, to] { ReadBlocks(entry, read, block, to); });
      }
    }
    ++i;
  }
  ParallelFor(jobs.size(), threads, [&](size_t i) { jobs[i](); });
}

}  // namespace hsdp_ckpt
