#include "base/crc32.h"

#include <zlib.h>

#include <algorithm>
#include <cstring>

#ifdef HSDP_CKPT_WITH_ISAL
#include <isa-l/crc.h>
#endif

namespace hsdp_ckpt {

uint32_t Crc32(std::span<const std::byte> data, uint32_t seed) {
#ifdef HSDP_CKPT_WITH_ISAL
  return crc32_gzip_refl(seed, reinterpret_cast<const unsigned char*>(data.data()), data.size());
#else
  return static_cast<uint32_t>(crc32_z(seed, reinterpret_cast<const Bytef*>(data.data()), data.size()));
#endif
}

uint32_t Crc32Combine(uint32_t first, uint32_t second, uint64_t second_size) {
  return static_cast<uint32_t>(crc32_combine(first, second, static_cast<z_off_t>(second_size)));
}

uint32_t CopyAndCrc32(std::span<std::byte> target, std::span<const std::byte> source, uint32_t seed) {
  constexpr size_t kStep = 32 << 10;  // fits the first-level cache with room for the source's lines
  for (size_t at = 0; at < source.size(); at += kStep) {
    const size_t size = std::min(kStep, source.size() - at);
    std::memcpy(target.data() + at, source.data() + at, size);
    // What is summed is what was copied, so a source that changes meanwhile cannot give a record that fails its check.
    seed = Crc32(target.subspan(at, size), seed);
  }
  return seed;
}

}  // namespace hsdp_ckpt
