#include "format/trailer.h"

#include <array>
#include <cstdint>
#include <cstring>

#include "base/crc32.h"
#include "base/error.h"

namespace hsdp_ckpt::format {
namespace {

constexpr std::string_view kMagic("\x89HCMD\r\n\x1a", 8);
constexpr uint32_t kVersion = 1;
constexpr size_t kChecksumSize = 4;

void PutLittleEndian(std::string& out, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) out.push_back(static_cast<char>(value >> (8 * i)));
}

uint64_t GetLittleEndian(std::span<const std::byte> bytes) {
  uint64_t value = 0;
  for (size_t i = 0; i < bytes.size(); ++i) value |= static_cast<uint64_t>(bytes[i]) << (8 * i);
  return value;
}

}  // namespace

std::string MetadataTrailer(std::span<const std::byte> pickle) {
  std::string trailer(kMagic);
  PutLittleEndian(trailer, pickle.size(), 8);
  PutLittleEndian(trailer, kVersion, 4);
  const uint32_t checksum = base::Crc32(std::as_bytes(std::span(trailer)), base::Crc32(pickle));
  PutLittleEndian(trailer, checksum, kChecksumSize);
  return trailer;
}

VerifiedPickle CheckMetadataTrailer(std::span<const std::byte> file, const std::string& path) {
  if (file.size() < kMetadataTrailerSize) return {file, false};
  const auto trailer = file.last(kMetadataTrailerSize);
  if (std::memcmp(trailer.data(), kMagic.data(), kMagic.size()) != 0) return {file, false};
  const auto stored = static_cast<uint32_t>(GetLittleEndian(trailer.last(kChecksumSize)));
  const uint32_t computed = base::Crc32(file.first(file.size() - kChecksumSize));
  if (stored != computed) {
    throw base::CorruptionError(path, "checksum of the metadata",
                                "CRC-32 " + std::to_string(stored), std::to_string(computed));
  }
  // Only now: a damaged version is damage, not a newer version.
  const uint64_t version = GetLittleEndian(trailer.subspan(16, 4));
  if (version != kVersion) {
    throw base::Error(path + ": metadata trailer of version " + std::to_string(version) +
                      ", and this package knows version " + std::to_string(kVersion) +
                      "; install a newer torch_hsdp_ckpt");
  }
  const uint64_t length = GetLittleEndian(trailer.subspan(8, 8));
  if (length != file.size() - kMetadataTrailerSize) {
    throw base::CorruptionError(path, "length of the metadata", std::to_string(length) + " bytes",
                                std::to_string(file.size() - kMetadataTrailerSize));
  }
  return {file.first(file.size() - kMetadataTrailerSize), true};
}

}  // namespace hsdp_ckpt::format
