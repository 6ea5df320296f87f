#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace hsdp_ckpt::base {

/// Bytes of a payload that have a checksum of their own, in files and in memory. Small, because a
/// part of a record costs up to a block more than asked for at either end.
constexpr int64_t kChecksumBlock = int64_t{64} << 10;

/// The CRC-32 of zip, gzip and zlib (reflected polynomial 0xEDB88320, initial value and final xor
/// all ones).
///
/// `seed` is the CRC of what came before, 0 at the start: Crc32(b, Crc32(a)) is the CRC of a
/// followed by b. ISA-L where the build has it (a carry-less multiplication kernel), zlib or a
/// plain table otherwise; all give the same value.
uint32_t Crc32(std::span<const std::byte> data, uint32_t seed = 0);

/// The CRC of a followed by b, from CRC(a), CRC(b) and the length of b. Costs about a microsecond,
/// whatever the length.
uint32_t Crc32Combine(uint32_t first, uint32_t second, uint64_t second_size);

/// Copies `source` to `target` and returns the CRC of what was copied, reading memory once: piece
/// by piece, each summed while it is still in the cache. The spans have the same size and do not
/// overlap.
uint32_t CopyAndCrc32(std::span<std::byte> target, std::span<const std::byte> source,
                      uint32_t seed = 0);

}  // namespace hsdp_ckpt::base
