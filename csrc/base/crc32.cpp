#include "base/crc32.h"

#include <algorithm>
#include <array>
#include <cstring>

#if defined(HSDP_CKPT_WITH_ISAL)
#include <isa-l/crc.h>
#elif defined(HSDP_CKPT_WITH_ZLIB)
#include <zlib.h>
#endif

namespace hsdp_ckpt::base {
namespace {

// Polynomials over GF(2) modulo the CRC's, reflected: bit 31 is the coefficient of x^0.
constexpr uint32_t kPolynomial = 0xedb88320;

constexpr uint32_t TimesX(uint32_t p) { return (p >> 1) ^ ((p & 1) != 0 ? kPolynomial : 0); }

constexpr uint32_t Multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
    if ((a & bit) != 0) product ^= b;
    b = TimesX(b);
  }
  return product;
}

// kSquares[i] is x to the power of 2^i. The powers repeat after 32: x^(2^32) is x, as the
// polynomial is primitive.
constexpr auto kSquares = [] {
  std::array<uint32_t, 32> out{1u << 30};
  for (size_t i = 1; i < out.size(); ++i) out[i] = Multiply(out[i - 1], out[i - 1]);
  return out;
}();

#if !defined(HSDP_CKPT_WITH_ISAL) && !defined(HSDP_CKPT_WITH_ZLIB)
constexpr auto kTable = [] {
  std::array<uint32_t, 256> out{};
  for (uint32_t i = 0; i < out.size(); ++i) {
    out[i] = i;
    for (int bit = 0; bit < 8; ++bit) out[i] = TimesX(out[i]);
  }
  return out;
}();
#endif

}  // namespace

uint32_t Crc32(std::span<const std::byte> data, uint32_t seed) {
#if defined(HSDP_CKPT_WITH_ISAL)
  return crc32_gzip_refl(seed, reinterpret_cast<const unsigned char*>(data.data()), data.size());
#elif defined(HSDP_CKPT_WITH_ZLIB)
  // A null pointer would mean the initial value to zlib, whatever the seed.
  if (data.empty()) return seed;
  return static_cast<uint32_t>(
      crc32_z(seed, reinterpret_cast<const Bytef*>(data.data()), data.size()));
#else
  uint32_t crc = ~seed;
  for (const std::byte byte : data)
    crc = (crc >> 8) ^ kTable[(crc ^ static_cast<uint32_t>(byte)) & 0xff];
  return ~crc;
#endif
}

uint32_t Crc32Combine(uint32_t first, uint32_t second, uint64_t second_size) {
  // Appending n bytes multiplies by x^(8n); the inversions at start and end cancel out.
  for (size_t power = 3; second_size != 0; second_size >>= 1, ++power) {
    if ((second_size & 1) != 0) first = Multiply(kSquares[power % 32], first);
  }
  return first ^ second;
}

uint32_t CopyAndCrc32(std::span<std::byte> target, std::span<const std::byte> source,
                      uint32_t seed) {
  constexpr size_t kStep = 4 << 10, kLine = 64;
  for (size_t at = 0; at < source.size(); at += kStep) {
    const size_t size = std::min(kStep, source.size() - at);
    // Reads that wait for nothing come first: memcpy, whose stores hold its reads up, finds its
    // source in the cache.
    const volatile std::byte* const read = source.data() + at;
    for (size_t i = 0; i < size; i += kLine) static_cast<void>(read[i]);
    std::memcpy(target.data() + at, source.data() + at, size);
    // What is summed is what was copied, so a source that changes meanwhile cannot give a record
    // that fails its check.
    seed = Crc32(target.subspan(at, size), seed);
  }
  return seed;
}

}  // namespace hsdp_ckpt::base
