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
constexpr uint32_t kVersionWithMark = 2;
constexpr size_t kChecksumSize = 4;

void PutLittleEndian(std::string& out, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) out.push_back(static_cast<char>(value >> (8 * i)));
}

uint64_t GetLittleEndian(std::span<const std::byte> bytes) {
  uint64_t value = 0;
  for (size_t i = 0; i < bytes.size(); ++i) value |= static_cast<uint64_t>(bytes[i]) << (8 * i);
  return value;
}

std::string EncodeMark(const RunMark& mark) {
  std::string out;
  PutLittleEndian(out, mark.run, 8);
  PutLittleEndian(out, mark.commit, 8);
  PutLittleEndian(out, base::Crc32(std::as_bytes(std::span(out))), kChecksumSize);
  return out;
}

// Bytes of the mark in a file with a trailer of this version.
size_t MarkSize(uint64_t version) { return version == kVersionWithMark ? kRunMarkSize : 0; }

}  // namespace

std::string MetadataTrailer(std::span<const std::byte> pickle, const std::optional<RunMark>& mark) {
  std::string trailer = mark ? EncodeMark(*mark) : "";
  trailer += kMagic;
  PutLittleEndian(trailer, pickle.size(), 8);
  PutLittleEndian(trailer, mark ? kVersionWithMark : kVersion, 4);
  const uint32_t checksum = base::Crc32(std::as_bytes(std::span(trailer)), base::Crc32(pickle));
  PutLittleEndian(trailer, checksum, kChecksumSize);
  return trailer;
}

std::string WithRunMark(std::span<const std::byte> file, const RunMark& mark,
                        const std::string& path) {
  const VerifiedPickle verified = CheckMetadataTrailer(file, path);
  if (!verified.checked) throw base::Error(path + ": metadata without a trailer has no run mark");
  std::string out;
  out.reserve(verified.pickle.size() + kRunMarkSize + kMetadataTrailerSize);
  out.append(reinterpret_cast<const char*>(verified.pickle.data()), verified.pickle.size());
  return out += MetadataTrailer(verified.pickle, mark);
}

std::optional<RunMark> ParseRunMark(std::span<const std::byte> end) {
  if (end.size() != kRunMarkSize + kMetadataTrailerSize) return std::nullopt;
  const auto trailer = end.last(kMetadataTrailerSize), mark = end.first(kRunMarkSize);
  if (std::memcmp(trailer.data(), kMagic.data(), kMagic.size()) != 0) return std::nullopt;
  if (GetLittleEndian(trailer.subspan(16, 4)) != kVersionWithMark) return std::nullopt;
  const auto numbers = mark.first(kRunMarkSize - kChecksumSize);
  if (GetLittleEndian(mark.last(kChecksumSize)) != base::Crc32(numbers)) return std::nullopt;
  return RunMark{GetLittleEndian(numbers.first(8)), GetLittleEndian(numbers.last(8))};
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
  if (version != kVersion && version != kVersionWithMark) {
    throw base::Error(path + ": metadata trailer of version " + std::to_string(version) +
                      ", and this package knows versions up to " +
                      std::to_string(kVersionWithMark) + "; install a newer torch_hsdp_ckpt");
  }
  const uint64_t length = GetLittleEndian(trailer.subspan(8, 8));
  const size_t behind = MarkSize(version) + kMetadataTrailerSize;
  if (file.size() < behind || length != file.size() - behind) {
    throw base::CorruptionError(path, "length of the metadata", std::to_string(length) + " bytes",
                                std::to_string(file.size()) + " with what stands behind it");
  }
  return {file.first(file.size() - behind), true};
}

}  // namespace hsdp_ckpt::format
