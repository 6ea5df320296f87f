#include "base/printable.h"

#include <cstdint>
#include <cstdio>

namespace hsdp_ckpt::base {
namespace {

struct CodePoint {
  uint32_t value;
  size_t bytes;  // 1 for a byte that is no UTF-8, as which it goes on
};

CodePoint CodePointAt(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[at + i]); };
  const size_t left = text.size() - at;
  const auto follows = [&](size_t i) { return i < left && (byte(i) & 0xc0) == 0x80; };
  const uint32_t first = byte(0);
  if (first >= 0xc2 && first < 0xe0 && follows(1))
    return {(first & 0x1f) << 6 | (byte(1) & 0x3fu), 2};
  if (first >= 0xe0 && first < 0xf0 && follows(1) && follows(2))
    return {(first & 0x0f) << 12 | (byte(1) & 0x3fu) << 6 | (byte(2) & 0x3fu), 3};
  return {first < 0x80 ? first : 0x100, 1};
}

bool IsControl(uint32_t c) { return (c < 0x20 && c != '\n') || (c >= 0x7f && c < 0xa0); }

// Characters that turn the direction of text, break lines, or show nothing.
bool IsInvisible(uint32_t c) {
  return c == 0x061c || (c >= 0x200b && c <= 0x200f) || (c >= 0x2028 && c <= 0x202e) ||
         (c >= 0x2060 && c <= 0x206f) || c == 0xfeff;
}

}  // namespace

std::string Printable(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const CodePoint point = CodePointAt(text, at);
    if (IsControl(point.value) || IsInvisible(point.value)) {
      char escape[8];
      std::snprintf(escape, sizeof(escape), point.value < 0x100 ? "\\x%02x" : "\\u%04x",
                    point.value);
      out += escape;
    } else {
      out += text.substr(at, point.bytes);
    }
    at += point.bytes;
  }
  return out;
}

}  // namespace hsdp_ckpt::base
