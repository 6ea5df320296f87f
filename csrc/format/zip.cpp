#include "format/zip.h"

#include <algorithm>

namespace hsdp_ckpt::format {
namespace {

constexpr uint16_t kVersion = 20;    // 4.4.3: 2.0, for directories and descriptors
constexpr uint16_t kVersion64 = 45;  // 4.4.3: 4.5, zip64
constexpr uint16_t kDosDate = 0x21;  // 1 January 1980

bool Needs64(const ZipEntry& entry) { return entry.size >= kZip32Max; }

uint32_t Low(uint64_t value) {
  return value >= kZip32Max ? kZip32Max : static_cast<uint32_t>(value);
}

// What is read, and what errors call it.
struct Archive {
  const ZipSource& source;
  uint64_t size;
  const std::string& path;
  const std::string& record;

  std::vector<std::byte> Read(uint64_t offset, uint64_t count) const {
    std::vector<std::byte> bytes(count);
    source(bytes, offset);
    return bytes;
  }
  base::ByteReader Reader(std::span<const std::byte> bytes) const { return {bytes, path, record}; }
  [[noreturn]] void Fail(const std::string& expected, const std::string& got) const {
    throw base::CorruptionError(path, record, expected, got);
  }
};

struct Directory {
  uint64_t offset;
  uint64_t size;
  uint64_t entries;
  uint64_t end;  // where the structures after the directory begin

  bool NeedsZip64() const { return entries == 0xffff || size == kZip32Max || offset == kZip32Max; }
};

// 4.3.16
Directory ReadEnd(const Archive& archive) {
  if (archive.size < ZipEnd::kSize)
    archive.Fail("a zip archive", std::to_string(archive.size) + " bytes");
  Directory out{};
  out.end = archive.size - ZipEnd::kSize;
  const auto raw = archive.Read(out.end, ZipEnd::kSize);
  base::ByteReader in = archive.Reader(raw);
  if (in.Get<uint32_t>() != ZipEnd::kSignature) archive.Fail("a zip archive's end", "other bytes");
  const auto disk = in.Get<uint16_t>(), start_disk = in.Get<uint16_t>();
  const auto here = in.Get<uint16_t>();
  out.entries = in.Get<uint16_t>();
  out.size = in.Get<uint32_t>();
  out.offset = in.Get<uint32_t>();
  const auto comment_size = in.Get<uint16_t>();
  if (disk != 0 || start_disk != 0 || here != out.entries || comment_size != 0)
    archive.Fail("a zip archive of one part without a comment", "another");
  return out;
}

bool HasLocator(const Archive& archive, const Directory& directory) {
  if (archive.size < ZipEnd::kSize + Zip64End::kLocatorSize + Zip64End::kSize) return false;
  const auto raw = archive.Read(directory.end - Zip64End::kLocatorSize, Zip64End::kLocatorSize);
  return archive.Reader(raw).Get<uint32_t>() == Zip64End::kLocatorSignature;
}

// 4.3.14, where 4.3.15 says that it is; `end` is what ReadEnd gave.
Directory ReadZip64End(const Archive& archive, const Directory& end) {
  const uint64_t locator_at = end.end - Zip64End::kLocatorSize;
  const auto raw_locator = archive.Read(locator_at, Zip64End::kLocatorSize);
  base::ByteReader locator = archive.Reader(raw_locator);
  locator.Get(8);  // signature, disk
  Directory out{};
  out.end = locator.Get<uint64_t>();
  const uint64_t expected = locator_at - Zip64End::kSize;
  if (out.end != expected) {
    archive.Fail("the zip64 end at " + std::to_string(expected), std::to_string(out.end));
  }
  const auto raw = archive.Read(out.end, Zip64End::kSize);
  base::ByteReader in = archive.Reader(raw);
  if (in.Get<uint32_t>() != Zip64End::kSignature) archive.Fail("a zip64 end", "other bytes");
  if (in.Get<uint64_t>() != Zip64End::kSize - 12)
    archive.Fail("a zip64 end of 56 bytes", "another");
  in.Get(12);  // versions, disks
  const auto here = in.Get<uint64_t>();
  out.entries = in.Get<uint64_t>();
  out.size = in.Get<uint64_t>();
  out.offset = in.Get<uint64_t>();
  if (here != out.entries) archive.Fail("one disk", "several");
  return out;
}

// Finds the central directory from the archive's end.
Directory FindDirectory(const Archive& archive) {
  Directory out = ReadEnd(archive);
  if (HasLocator(archive, out)) {
    out = ReadZip64End(archive, out);
  } else if (out.NeedsZip64()) {
    archive.Fail("a zip64 end", "none");
  }
  // In this order, so that no sum can wrap around.
  if (out.offset > out.end || out.size != out.end - out.offset) {
    archive.Fail("a central directory that ends at " + std::to_string(out.end),
                 "offset " + std::to_string(out.offset) + ", size " + std::to_string(out.size));
  }
  if (out.entries > out.size / ZipCentralHeader::kSize) {
    archive.Fail("as many entries as fit into " + std::to_string(out.size) + " bytes",
                 std::to_string(out.entries));
  }
  return out;
}

// 4.5.3: the extra field holds, in this order and only where the header has all ones, size,
// compressed size and offset.
void ReadZip64Extra(base::ByteReader extra, uint64_t* size, uint64_t* compressed,
                    uint64_t* offset) {
  while (extra.remaining() >= 4) {
    const auto id = extra.Get<uint16_t>();
    const auto length = extra.Get<uint16_t>();
    base::ByteReader field(extra.Get(length), "", "");
    if (id != kZip64Extra) continue;
    for (uint64_t* value : {size, compressed, offset}) {
      if (*value == kZip32Max && field.remaining() >= 8) *value = field.Get<uint64_t>();
    }
  }
}

// 4.3.12. The place of the entry's bytes is yet to come.
ZipEntry ReadCentralHeader(base::ByteReader& in, const Archive& archive) {
  if (in.Get<uint32_t>() != ZipCentralHeader::kSignature)
    in.Fail("a central directory header", "other bytes");
  in.Get(4);  // versions
  const auto flags = in.Get<uint16_t>();
  const auto method = in.Get<uint16_t>();
  in.Get(4);  // time, date
  ZipEntry entry;
  entry.crc = in.Get<uint32_t>();
  uint64_t compressed = in.Get<uint32_t>();
  entry.size = in.Get<uint32_t>();
  const auto name_size = in.Get<uint16_t>(), extra_size = in.Get<uint16_t>(),
             comment_size = in.Get<uint16_t>();
  in.Get(8);  // disk, attributes
  entry.header_offset = in.Get<uint32_t>();
  entry.name = std::string(in.GetText(name_size));
  ReadZip64Extra(archive.Reader(in.Get(extra_size)), &entry.size, &compressed,
                 &entry.header_offset);
  in.Get(comment_size);
  if (method != 0 || (flags & 1) != 0 || compressed != entry.size)
    in.Fail("a stored entry", "a packed or encrypted one");
  return entry;
}

// 4.3.7: where the entry's bytes really begin. What the local header says must be what the
// directory says.
uint64_t ReadLocalHeader(const ZipEntry& entry, const Archive& archive,
                         const Directory& directory) {
  if (entry.header_offset > directory.offset ||
      directory.offset - entry.header_offset < ZipLocalHeader::kSize) {
    archive.Fail(entry.name + "'s header before the directory",
                 "offset " + std::to_string(entry.header_offset));
  }
  const auto raw = archive.Read(entry.header_offset, ZipLocalHeader::kSize);
  base::ByteReader in = archive.Reader(raw);
  if (in.Get<uint32_t>() != ZipLocalHeader::kSignature)
    archive.Fail(entry.name + "'s local header", "other bytes");
  in.Get(2);  // version
  const auto flags = in.Get<uint16_t>();
  const auto method = in.Get<uint16_t>();
  in.Get(4);  // time, date
  const auto crc = in.Get<uint32_t>();
  in.Get(8);  // sizes
  const uint64_t name_size = in.Get<uint16_t>(), extra_size = in.Get<uint16_t>();
  const bool described_later = (flags & kZipDataDescriptorFlag) != 0;
  if (method != 0 || name_size != entry.name.size() || (!described_later && crc != entry.crc))
    archive.Fail(entry.name + "'s local header as the directory has it", "another");
  const uint64_t begin = entry.header_offset + ZipLocalHeader::kSize + name_size + extra_size;
  if (begin > directory.offset || entry.size > directory.offset - begin) {
    archive.Fail(entry.name + " before the directory",
                 std::to_string(entry.size) + " bytes at " + std::to_string(begin));
  }
  const auto name = archive.Read(entry.header_offset + ZipLocalHeader::kSize, name_size);
  if (base::AsText(name) != entry.name)
    archive.Fail("a local header for " + entry.name, "another name");
  return begin;
}

void CheckNoOverlap(const std::vector<ZipEntry>& entries, const Archive& archive) {
  std::vector<const ZipEntry*> order;
  for (const auto& entry : entries) order.push_back(&entry);
  std::sort(order.begin(), order.end(),
            [](auto* a, auto* b) { return a->header_offset < b->header_offset; });
  for (size_t i = 1; i < order.size(); ++i) {
    const ZipEntry& before = *order[i - 1];
    if (before.data_offset + before.size > order[i]->header_offset) {
      archive.Fail("entries one after the other",
                   before.name + " and " + order[i]->name + " overlap");
    }
  }
}

}  // namespace

bool LooksLikeZip(std::span<const std::byte> last_bytes) {
  if (last_bytes.size() < ZipEnd::kSize) return false;
  return base::ByteReader(last_bytes.last(ZipEnd::kSize), "", "").Get<uint32_t>() ==
         ZipEnd::kSignature;
}

std::vector<ZipEntry> ReadZipDirectory(const ZipSource& source, uint64_t size,
                                       const std::string& path, const std::string& record) {
  const Archive archive{source, size, path, record};
  const Directory directory = FindDirectory(archive);
  const auto raw = archive.Read(directory.offset, directory.size);
  base::ByteReader in = archive.Reader(raw);
  std::vector<ZipEntry> entries;
  for (uint64_t i = 0; i < directory.entries; ++i) {
    ZipEntry entry = ReadCentralHeader(in, archive);
    entry.data_offset = ReadLocalHeader(entry, archive, directory);
    entries.push_back(std::move(entry));
  }
  if (in.remaining() != 0)
    in.Fail("a directory of " + std::to_string(directory.entries) + " entries", "more bytes");
  CheckNoOverlap(entries, archive);
  return entries;
}

void PutZipLocalHeader(base::ByteWriter& out, const ZipEntry& entry, bool descriptor_follows,
                       size_t padding) {
  const bool large = Needs64(entry);
  out.Put(ZipLocalHeader::kSignature);
  out.Put(large ? kVersion64 : kVersion);
  out.Put(static_cast<uint16_t>(kZipUtf8Flag | (descriptor_follows ? kZipDataDescriptorFlag : 0)));
  out.Put(uint16_t{0});  // stored
  out.Put(uint16_t{0});
  out.Put(kDosDate);
  out.Put(descriptor_follows ? 0u : entry.crc);
  // 4.3.9.2: the zip64 extra field tells a reader that the descriptor's sizes have 8 bytes.
  const uint32_t size = large                ? kZip32Max
                        : descriptor_follows ? 0u
                                             : static_cast<uint32_t>(entry.size);
  out.Put(size);
  out.Put(size);
  out.Put(static_cast<uint16_t>(entry.name.size()));
  out.Put(static_cast<uint16_t>((large ? 20 : 0) + padding));
  out.Put(std::string_view(entry.name));
  if (large) {
    out.Put(kZip64Extra);
    out.Put(uint16_t{16});
    out.Put(uint64_t{0});
    out.Put(uint64_t{0});
  }
  if (padding > 0) {
    out.Put(kZipPaddingExtra);
    out.Put(static_cast<uint16_t>(padding - 4));
    out.PutZeros(padding - 4);
  }
}

void PutZipDataDescriptor(base::ByteWriter& out, const ZipEntry& entry) {
  out.Put(ZipDataDescriptor::kSignature);
  out.Put(entry.crc);
  for (int i = 0; i < 2; ++i) {
    if (Needs64(entry))
      out.Put(entry.size);
    else
      out.Put(static_cast<uint32_t>(entry.size));
  }
}

namespace {

// 4.3.12
void PutCentralHeader(base::ByteWriter& out, const ZipEntry& entry, bool described_later) {
  const bool large = Needs64(entry);
  out.Put(ZipCentralHeader::kSignature);
  out.Put(uint16_t{0});
  out.Put(large ? kVersion64 : kVersion);
  out.Put(static_cast<uint16_t>(kZipUtf8Flag | (described_later ? kZipDataDescriptorFlag : 0)));
  out.Put(uint16_t{0});
  out.Put(uint16_t{0});
  out.Put(kDosDate);
  out.Put(entry.crc);
  out.Put(Low(entry.size));
  out.Put(Low(entry.size));
  out.Put(static_cast<uint16_t>(entry.name.size()));
  out.Put(static_cast<uint16_t>(large ? 20 : 0));
  out.PutZeros(10);  // no comment, disk 0, no attributes
  // Our entries all begin in the first pages.
  out.Put(static_cast<uint32_t>(entry.header_offset));
  out.Put(std::string_view(entry.name));
  if (large) {
    out.Put(kZip64Extra);
    out.Put(uint16_t{16});
    out.Put(entry.size);
    out.Put(entry.size);
  }
}

// 4.3.14 and 4.3.15
void PutZip64End(base::ByteWriter& out, uint64_t entries, uint64_t directory_offset,
                 uint64_t directory_size) {
  out.Put(Zip64End::kSignature);
  out.Put(uint64_t{Zip64End::kSize - 12});
  out.Put(kVersion64);
  out.Put(kVersion64);
  out.PutZeros(8);  // disk 0
  out.Put(entries);
  out.Put(entries);
  out.Put(directory_size);
  out.Put(directory_offset);
  out.Put(Zip64End::kLocatorSignature);
  out.PutZeros(4);
  out.Put(directory_offset + directory_size);
  out.Put(uint32_t{1});
}

}  // namespace

void PutZipDirectory(base::ByteWriter& out, std::span<const ZipEntry> entries,
                     uint64_t directory_offset, const std::string& described_later) {
  const size_t start = out.size();
  bool large = directory_offset >= kZip32Max;
  for (const ZipEntry& entry : entries) {
    large = large || Needs64(entry);
    PutCentralHeader(out, entry, entry.name == described_later);
  }
  const uint64_t size = out.size() - start;
  if (large) PutZip64End(out, entries.size(), directory_offset, size);
  out.Put(ZipEnd::kSignature);
  out.PutZeros(4);
  out.Put(static_cast<uint16_t>(entries.size()));
  out.Put(static_cast<uint16_t>(entries.size()));
  out.Put(static_cast<uint32_t>(size));
  out.Put(Low(directory_offset));
  out.PutZeros(2);
}

}  // namespace hsdp_ckpt::format
