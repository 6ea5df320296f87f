#include "checkpoint/load/stock_record.h"

#include <algorithm>

#include "base/crc32.h"
#include "base/error.h"

namespace hsdp_ckpt::checkpoint {
namespace {

constexpr uint64_t kSmallEntry =
    64 << 10;  // data.pkl of a tensor, byteorder, version: hundreds of bytes at most

void CheckCrc(const format::ZipEntry& entry, std::span<const std::byte> bytes,
              const std::string& path, const std::string& name) {
  const uint32_t crc = base::Crc32(bytes);
  if (crc != entry.crc) {
    throw base::CorruptionError(path, name + " (" + entry.name + ")", base::CrcText(entry.crc),
                                base::CrcText(crc));
  }
}

bool IsZip(const format::ZipSource& source, uint64_t length) {
  if (length < format::ZipEnd::kSize) return false;
  std::vector<std::byte> first(4), last(format::ZipEnd::kSize);
  source(first, 0);
  source(last, length - last.size());
  // Either end is enough: a zip with one damaged end is a damaged zip and not something else.
  return base::ByteReader(first, "", "").Get<uint32_t>() == format::ZipLocalHeader::kSignature ||
         format::LooksLikeZip(last);
}

// What torch.save wrote, if it is a zip: a plain one, with every entry's CRC.
void CheckZip(std::span<const std::byte> bytes, const std::string& path, const std::string& name) {
  const auto source = [&](std::span<std::byte> target, uint64_t at) {
    std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(at), target.size(), target.begin());
  };
  if (!IsZip(source, bytes.size())) return;
  for (const format::ZipEntry& entry : format::ReadZipDirectory(source, bytes.size(), path, name)) {
    CheckCrc(entry, bytes.subspan(entry.data_offset, entry.size), path, name);
  }
}

// The entries that the zip of a single plain tensor has.
struct TensorEntries {
  const format::ZipEntry* pickle = nullptr;
  const format::ZipEntry* payload = nullptr;
  const format::ZipEntry* byteorder = nullptr;
};

// Nothing for a zip of anything else. Names are the archive's, a slash, and one of those below.
std::optional<TensorEntries> FindTensorEntries(const std::vector<format::ZipEntry>& entries) {
  TensorEntries found;
  for (const format::ZipEntry& entry : entries) {
    const size_t slash = entry.name.find('/');
    const std::string base = slash == std::string::npos ? "" : entry.name.substr(slash + 1);
    if (base == "data.pkl") found.pickle = &entry;
    if (base == "byteorder") found.byteorder = &entry;
    if (base == "data/0") found.payload = &entry;
    if (base.starts_with("data/") && base != "data/0") return std::nullopt;
  }
  if (found.pickle == nullptr || found.payload == nullptr || found.byteorder == nullptr)
    return std::nullopt;
  return found;
}

}  // namespace

StockRecord OpenStockRecord(const io::File& file, const std::string& name, int64_t offset,
                            int64_t length) {
  StockRecord record;
  const auto source = [&](std::span<std::byte> target, uint64_t at) {
    file.ReadAt(target, offset + static_cast<int64_t>(at), name);
  };
  record.is_zip = IsZip(source, static_cast<uint64_t>(length));
  if (!record.is_zip) return record;
  record.entries =
      format::ReadZipDirectory(source, static_cast<uint64_t>(length), file.path(), name);
  const auto tensor_entries = FindTensorEntries(record.entries);
  if (!tensor_entries) return record;
  const format::ZipEntry& payload = *tensor_entries->payload;
  for (const format::ZipEntry& entry : record.entries) {
    if (&entry == &payload) continue;
    if (entry.size > kSmallEntry) return record;
    std::vector<std::byte> bytes(entry.size);
    source(bytes, entry.data_offset);
    CheckCrc(entry, bytes, file.path(), name);
    if (&entry == tensor_entries->byteorder && base::AsText(bytes) != "little") return record;
    if (&entry == tensor_entries->pickle) record.tensor = format::DecodeTensorPickle(bytes);
  }
  if (record.tensor && static_cast<uint64_t>(record.tensor->storage_bytes) != payload.size) {
    throw base::CorruptionError(
        file.path(), name,
        "a storage of " + std::to_string(record.tensor->storage_bytes) + " bytes",
        std::to_string(payload.size));
  }
  record.payload = payload;
  return record;
}

std::vector<std::byte> ReadStockBytes(const io::File& file, const std::string& name, int64_t offset,
                                      int64_t length) {
  std::vector<std::byte> bytes(static_cast<size_t>(length));
  file.ReadAt(bytes, offset, name);
  CheckZip(bytes, file.path(), name);
  return bytes;
}

}  // namespace hsdp_ckpt::checkpoint
