#include "base/crc32.h"

#ifdef HSDP_CKPT_WITH_ISAL
#include <isa-l/crc.h>
#else
#include <zlib.h>
#endif

namespace hsdp_ckpt {

uint32_t Crc32(std::span<const std::byte> bytes, uint32_t seed) {
#ifdef HSDP_CKPT_WITH_ISAL
  return crc32_gzip_refl(seed, reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size());
#else
  return static_cast<uint32_t>(crc32_z(seed, reinterpret_cast<const Bytef*>(bytes.data()), bytes.size()));
#endif
}

}  // namespace hsdp_ckpt
