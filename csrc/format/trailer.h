#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

namespace hsdp_ckpt::format {

// What this package appends to the pickle of a `.metadata` file. An unpickler stops at the STOP
// opcode and never sees it.
//
//   byte  0  magic     8 bytes, 89 'H' 'C' 'M' 'D' 0D 0A 1A
//   byte  8  length    u64, little-endian: bytes of the pickle, STOP included
//   byte 16  version   u32, little-endian: 1, or 2 behind a run mark
//   byte 20  checksum  u32, little-endian: CRC-32 (zip's) of every byte of the file before it
//
// A checkpoint of a training run has a run mark between the two, which has a checksum of its own:
// so the order of a run's checkpoints is known from the last bytes of each.
//
//   byte  0  run       u64, little-endian
//   byte  8  commit    u64, little-endian
//   byte 16  checksum  u32, little-endian: CRC-32 of the 16 bytes before it
//
// The trailer ends the file. It is looked for at the end, and a file that has none must end at
// STOP, so that no single changed byte can turn a checked file into an unchecked one.
inline constexpr size_t kMetadataTrailerSize = 24;
inline constexpr size_t kRunMarkSize = 20;

/// Which training run a checkpoint belongs to, and when it was committed there.
struct RunMark {
  uint64_t run = 0;     ///< random; the same in all checkpoints of a run
  uint64_t commit = 0;  ///< from 1 up, by one or more with each checkpoint that is committed

  friend bool operator==(const RunMark&, const RunMark&) = default;
};

/// What goes behind a pickle in the same file: the mark, if there is one, and the trailer.
std::string MetadataTrailer(std::span<const std::byte> pickle,
                            const std::optional<RunMark>& mark = std::nullopt);

/// A metadata file with a trailer, as it is with this mark. Throws as CheckMetadataTrailer does,
/// and Error for a file without a trailer.
std::string WithRunMark(std::span<const std::byte> file, const RunMark& mark,
                        const std::string& path);

/// The mark in the last `kRunMarkSize + kMetadataTrailerSize` bytes of a metadata file; nothing if
/// it has none, or a damaged one. The rest of the file is not checked.
std::optional<RunMark> ParseRunMark(std::span<const std::byte> end);

struct VerifiedPickle {
  std::span<const std::byte> pickle;  // a part of the file's bytes
  bool checked;  // false: stock torch wrote it, and there is nothing to check it by
};

/// Takes the trailer off, if there is one. Throws CorruptionError when it does not fit the bytes
/// before it, and Error for one of a newer version.
VerifiedPickle CheckMetadataTrailer(std::span<const std::byte> file, const std::string& path);

}  // namespace hsdp_ckpt::format
