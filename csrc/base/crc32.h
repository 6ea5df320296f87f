#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace hsdp_ckpt {

/// CRC-32 as zip and gzip define it (reflected polynomial 0xEDB88320). `seed` is the CRC of the bytes before, so a long
/// run of bytes can be summed in pieces: Crc32(b, Crc32(a)) == Crc32(a followed by b).
uint32_t Crc32(std::span<const std::byte> bytes, uint32_t seed = 0);

}  // namespace hsdp_ckpt
