#include "base/error.h"

#include <cstdio>
#include <cstring>

namespace hsdp_ckpt::base {
namespace {

std::string At(int64_t offset) { return offset < 0 ? "" : " at offset " + std::to_string(offset); }

}  // namespace

IoError::IoError(const std::string& op, const std::string& path, int64_t offset, int error_number)
    : Error(op + " " + path + At(offset) + ": " + std::strerror(error_number)),
      op_(op),
      path_(path),
      offset_(offset),
      error_number_(error_number) {}

CorruptionError::CorruptionError(const std::string& path, const std::string& record,
                                 const std::string& expected, const std::string& got)
    : Error(path + ": " + record + ": expected " + expected + ", got " + got),
      path_(path),
      record_(record) {}

CorruptionError::CorruptionError(const std::string& path, const std::string& problem)
    : Error(path + ": " + problem), path_(path) {}

std::string CrcText(uint32_t crc) {
  char text[16];
  std::snprintf(text, sizeof(text), "CRC %08x", crc);
  return text;
}

std::string ShapeText(std::span<const int64_t> numbers) {
  std::string out = "[";
  for (const int64_t n : numbers) out += (out.size() > 1 ? ", " : "") + std::to_string(n);
  return out + "]";
}

}  // namespace hsdp_ckpt::base
