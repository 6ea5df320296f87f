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

struct Directory {
  uint64_t offset;
  uint64_t size;
  uint64_t entries;
  uint64_t end;  // where the structures after the directory begin
};

// Finds the central directory from the archive's end: 4.3.16, and 4.3.15 / 4.3.14 before it where a
// value does not fit.
Directory FindDirectory(const ZipSource& source, uint64_t size, const std::string& path,
                        const std::string& record) {
  const auto fail = [&](const std::string& expected, const std::string& got) {
    throw base::CorruptionError(path, record, expected, got);
  };
  if (size < ZipEnd::kSize) fail("a zip archive", std::to_string(size) + " bytes");
  std::vector<std::byte> raw(ZipEnd::kSize);
  source(raw, size - ZipEnd::kSize);
  base::ByteReader in(raw, path, record);
  if (in.Get<uint32_t>() != ZipEnd::kSignature) fail("a zip archive's end", "other bytes");
  const auto disk = in.Get<uint16_t>(), start_disk = in.Get<uint16_t>();
  const auto here = in.Get<uint16_t>(), total = in.Get<uint16_t>();
  Directory out{};
  out.entries = total;
  out.size = in.Get<uint32_t>();
  out.offset = in.Get<uint32_t>();
  out.end = size - ZipEnd::kSize;
  if (disk != 0 || start_disk != 0 || here != total || in.Get<uint16_t>() != 0) {
    fail("a zip archive of one part without a comment", "another");
  }
  const bool large = total == 0xffff || out.size == kZip32Max || out.offset == kZip32Max;
  bool has_locator = false;
  if (size >= ZipEnd::kSize + Zip64End::kLocatorSize + Zip64End::kSize) {
    raw.resize(Zip64End::kLocatorSize);
    source(raw, out.end - Zip64End::kLocatorSize);
    base::ByteReader locator(raw, path, record);
    has_locator = locator.Get<uint32_t>() == Zip64End::kLocatorSignature;
    if (has_locator) {
      locator.Get<uint32_t>();
      const auto at = locator.Get<uint64_t>();
      const uint64_t expected = out.end - Zip64End::kLocatorSize - Zip64End::kSize;
      if (at != expected) fail("the zip64 end at " + std::to_string(expected), std::to_string(at));
      raw.resize(Zip64End::kSize);
      source(raw, at);
      base::ByteReader end64(raw, path, record);
      if (end64.Get<uint32_t>() != Zip64End::kSignature) fail("a zip64 end", "other bytes");
      if (end64.Get<uint64_t>() != Zip64End::kSize - 12) fail("a zip64 end of 56 bytes", "another");
      end64.Get(12);  // versions, disks
      const auto here64 = end64.Get<uint64_t>();
      out.entries = end64.Get<uint64_t>();
      out.size = end64.Get<uint64_t>();
      out.offset = end64.Get<uint64_t>();
      out.end = at;
      if (here64 != out.entries) fail("one disk", "several");
    }
  }
  if (large && !has_locator) fail("a zip64 end", "none");
  // In this order, so that no sum can wrap around.
  if (out.offset > out.end || out.size != out.end - out.offset) {
    fail("a central directory that ends at " + std::to_string(out.end),
         "offset " + std::to_string(out.offset) + ", size " + std::to_string(out.size));
  }
  if (out.entries > out.size / ZipCentralHeader::kSize) {
    fail("as many entries as fit into " + std::to_string(out.size) + " bytes",
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

}  // namespace

bool LooksLikeZip(std::span<const std::byte> last_bytes) {
  if (last_bytes.size() < ZipEnd::kSize) return false;
  return base::ByteReader(last_bytes.last(ZipEnd::kSize), "", "").Get<uint32_t>() ==
         ZipEnd::kSignature;
}

std::vector<ZipEntry> ReadZipDirectory(const ZipSource& source, uint64_t size,
                                       const std::string& path, const std::string& record) {
  const Directory directory = FindDirectory(source, size, path, record);
  std::vector<std::byte> raw(directory.size);
  source(raw, directory.offset);
  base::ByteReader in(raw, path, record);
  std::vector<ZipEntry> entries;
  for (uint64_t i = 0; i < directory.entries; ++i) {
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
    ReadZip64Extra(base::ByteReader(in.Get(extra_size), path, record), &entry.size, &compressed,
                   &entry.header_offset);
    in.Get(comment_size);
    if (method != 0 || (flags & 1) != 0 || compressed != entry.size)
      in.Fail("a stored entry", "a packed or encrypted one");

    // The local header, where the bytes really begin; what it says must be what the directory says.
    if (entry.header_offset > directory.offset ||
        directory.offset - entry.header_offset < ZipLocalHeader::kSize) {
      in.Fail(entry.name + "'s header before the directory",
              "offset " + std::to_string(entry.header_offset));
    }
    std::vector<std::byte> head(ZipLocalHeader::kSize);
    source(head, entry.header_offset);
    base::ByteReader local(head, path, record);
    if (local.Get<uint32_t>() != ZipLocalHeader::kSignature)
      in.Fail(entry.name + "'s local header", "other bytes");
    local.Get(2);
    const auto local_flags = local.Get<uint16_t>();
    const auto local_method = local.Get<uint16_t>();
    local.Get(4);
    const auto local_crc = local.Get<uint32_t>();
    local.Get(8);
    const uint64_t local_name = local.Get<uint16_t>(), local_extra = local.Get<uint16_t>();
    const bool described_later = (local_flags & kZipDataDescriptorFlag) != 0;
    if (local_method != 0 || local_name != name_size ||
        (!described_later && local_crc != entry.crc)) {
      in.Fail(entry.name + "'s local header as the directory has it", "another");
    }
    entry.data_offset = entry.header_offset + ZipLocalHeader::kSize + local_name + local_extra;
    if (entry.data_offset > directory.offset || entry.size > directory.offset - entry.data_offset) {
      in.Fail(entry.name + " before the directory",
              std::to_string(entry.size) + " bytes at " + std::to_string(entry.data_offset));
    }
    std::vector<std::byte> name(name_size);
    source(name, entry.header_offset + ZipLocalHeader::kSize);
    if (base::AsText(name) != entry.name)
      in.Fail("a local header for " + entry.name, "another name");
    entries.push_back(std::move(entry));
  }
  if (in.remaining() != 0)
    in.Fail("a directory of " + std::to_string(directory.entries) + " entries", "more bytes");

  std::vector<const ZipEntry*> order;
  for (const auto& entry : entries) order.push_back(&entry);
  std::sort(order.begin(), order.end(),
            [](auto* a, auto* b) { return a->header_offset < b->header_offset; });
  for (size_t i = 1; i < order.size(); ++i) {
    if (order[i - 1]->data_offset + order[i - 1]->size > order[i]->header_offset) {
      in.Fail("entries one after the other",
              order[i - 1]->name + " and " + order[i]->name + " overlap");
    }
  }
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

void PutZipDirectory(base::ByteWriter& out, std::span<const ZipEntry> entries,
                     uint64_t directory_offset, const std::string& described_later) {
  const size_t start = out.size();
  bool large = directory_offset >= kZip32Max;
  for (const ZipEntry& entry : entries) {
    const bool entry64 = Needs64(entry);
    large = large || entry64;
    out.Put(ZipCentralHeader::kSignature);
    out.Put(uint16_t{0});
    out.Put(entry64 ? kVersion64 : kVersion);
    out.Put(static_cast<uint16_t>(kZipUtf8Flag |
                                  (entry.name == described_later ? kZipDataDescriptorFlag : 0)));
    out.Put(uint16_t{0});
    out.Put(uint16_t{0});
    out.Put(kDosDate);
    out.Put(entry.crc);
    out.Put(Low(entry.size));
    out.Put(Low(entry.size));
    out.Put(static_cast<uint16_t>(entry.name.size()));
    out.Put(static_cast<uint16_t>(entry64 ? 20 : 0));
    out.PutZeros(10);  // no comment, disk 0, no attributes
    out.Put(
        static_cast<uint32_t>(entry.header_offset));  // our entries all begin in the first pages
    out.Put(std::string_view(entry.name));
    if (entry64) {
      out.Put(kZip64Extra);
      out.Put(uint16_t{16});
      out.Put(entry.size);
      out.Put(entry.size);
    }
  }
  const uint64_t size = out.size() - start;
  if (large) {
    out.Put(Zip64End::kSignature);
    out.Put(uint64_t{Zip64End::kSize - 12});
    out.Put(kVersion64);
    out.Put(kVersion64);
    out.PutZeros(8);  // disk 0
    out.Put(uint64_t{entries.size()});
    out.Put(uint64_t{entries.size()});
    out.Put(size);
    out.Put(directory_offset);
    out.Put(Zip64End::kLocatorSignature);
    out.PutZeros(4);
    out.Put(directory_offset + size);
    out.Put(uint32_t{1});
  }
  out.Put(ZipEnd::kSignature);
  out.PutZeros(4);
  out.Put(static_cast<uint16_t>(entries.size()));
  out.Put(static_cast<uint16_t>(entries.size()));
  out.Put(static_cast<uint32_t>(size));
  out.Put(Low(directory_offset));
  out.PutZeros(2);
}

}  // namespace hsdp_ckpt::format
