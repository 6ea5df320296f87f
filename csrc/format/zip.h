#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "base/bytes.h"

namespace hsdp_ckpt::format {

/// The parts of a zip archive that a record has, as structs; section numbers are those of PKWARE's
/// APPNOTE.TXT 6.3. Entries are stored (never compressed); names are ASCII; times are zip's zero, 1
/// January 1980.

/// 4.3.7 Local file header. A CRC and sizes of a later data descriptor (4.4.4, bit 3) are zero
/// here.
struct ZipLocalHeader {
  static constexpr uint32_t kSignature = 0x04034b50;
  static constexpr size_t kSize = 30;
};
/// 4.3.9 Data descriptor, with the signature that nearly all readers expect; 8-byte sizes with
/// zip64.
struct ZipDataDescriptor {
  static constexpr uint32_t kSignature = 0x08074b50;
};
/// 4.3.12 Central directory header.
struct ZipCentralHeader {
  static constexpr uint32_t kSignature = 0x02014b50;
  static constexpr size_t kSize = 46;
};
/// 4.3.14 and 4.3.15 Zip64 end of central directory record and its locator.
struct Zip64End {
  static constexpr uint32_t kSignature = 0x06064b50;
  static constexpr uint32_t kLocatorSignature = 0x07064b50;
  static constexpr size_t kSize = 56;
  static constexpr size_t kLocatorSize = 20;
};
/// 4.3.16 End of central directory record.
struct ZipEnd {
  static constexpr uint32_t kSignature = 0x06054b50;
  static constexpr size_t kSize = 22;
};

constexpr uint16_t kZipDataDescriptorFlag = 1 << 3;  ///< 4.4.4
constexpr uint16_t kZipUtf8Flag = 1 << 11;           ///< 4.4.4
constexpr uint16_t kZip64Extra = 0x0001;             ///< 4.5.3
constexpr uint16_t kZipPaddingExtra = 0x4246;        ///< "FB", what torch pads with
constexpr uint32_t kZip32Max = 0xffffffff;

struct ZipEntry {
  std::string name;
  uint64_t header_offset = 0;  ///< of its local header, from the archive's start
  uint64_t data_offset = 0;    ///< of its bytes, from the archive's start
  uint64_t size = 0;
  uint32_t crc = 0;
};

/// Reads `target.size()` bytes at `offset` from the archive's start; called only with ranges inside
/// the archive.
using ZipSource = std::function<void(std::span<std::byte> target, uint64_t offset)>;

/// The entries of an archive of `size` bytes, from hostile input. Every number is checked against
/// `size` before it is used, and memory is bounded by the archive's own size. Refused with
/// CorruptionError(path, record, ...): compressed or encrypted entries, more than one disk, a
/// comment, entries or structures that overlap, a local header that says otherwise than the
/// directory. Contents are not read: their CRC is the caller's to check.
std::vector<ZipEntry> ReadZipDirectory(const ZipSource& source, uint64_t size,
                                       const std::string& path, const std::string& record);

/// Whether the archive ends as a zip does; what does not is no zip at all and may be something
/// else.
bool LooksLikeZip(std::span<const std::byte> last_bytes);

/// Writers of the parts, for `record`.
void PutZipLocalHeader(base::ByteWriter& out, const ZipEntry& entry, bool descriptor_follows,
                       size_t padding);
void PutZipDataDescriptor(base::ByteWriter& out, const ZipEntry& entry);
void PutZipDirectory(base::ByteWriter& out, std::span<const ZipEntry> entries,
                     uint64_t directory_offset, const std::string& described_later);

}  // namespace hsdp_ckpt::format
