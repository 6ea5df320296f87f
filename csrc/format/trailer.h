#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace hsdp_ckpt::format {

// What this package appends to the pickle of a `.metadata` file. An unpickler stops at the STOP
// opcode and never sees it.
//
//   byte  0  magic     8 bytes, 89 'H' 'C' 'M' 'D' 0D 0A 1A
//   byte  8  length    u64, little-endian: bytes of the pickle, STOP included
//   byte 16  version   u32, little-endian: 1
//   byte 20  checksum  u32, little-endian: CRC-32 (zip's) of every byte of the file before it
//
// The trailer ends the file. It is looked for at the end, and a file that has none must end at
// STOP, so that no single changed byte can turn a checked file into an unchecked one.
inline constexpr size_t kMetadataTrailerSize = 24;

/// The trailer for a pickle: append it to the same file.
std::string MetadataTrailer(std::span<const std::byte> pickle);

struct VerifiedPickle {
  std::span<const std::byte> pickle;  // a part of the file's bytes
  bool checked;  // false: stock torch wrote it, and there is nothing to check it by
};

/// Takes the trailer off, if there is one. Throws CorruptionError when it does not fit the bytes
/// before it, and Error for one of a newer version.
VerifiedPickle CheckMetadataTrailer(std::span<const std::byte> file, const std::string& path);

}  // namespace hsdp_ckpt::format
