#include "pickle/text.h"

#include <charconv>
#include <cstdint>

namespace hsdp_ckpt::pickle {
namespace {

void AppendUtf8(std::string& out, uint32_t c) {
  if (c < 0x80) {
    out.push_back(static_cast<char>(c));
  } else if (c < 0x800) {
    out.push_back(static_cast<char>(0xC0 | c >> 6));
    out.push_back(static_cast<char>(0x80 | (c & 0x3F)));
  } else if (c < 0x10000) {
    out.push_back(static_cast<char>(0xE0 | c >> 12));
    out.push_back(static_cast<char>(0x80 | (c >> 6 & 0x3F)));
    out.push_back(static_cast<char>(0x80 | (c & 0x3F)));
  } else {
    out.push_back(static_cast<char>(0xF0 | c >> 18));
    out.push_back(static_cast<char>(0x80 | (c >> 12 & 0x3F)));
    out.push_back(static_cast<char>(0x80 | (c >> 6 & 0x3F)));
    out.push_back(static_cast<char>(0x80 | (c & 0x3F)));
  }
}

// Reads one character and moves `text` on. False for malformed input.
bool NextCharacter(std::string_view& text, uint32_t& c) {
  const auto first = static_cast<uint8_t>(text[0]);
  if (first < 0x80) {
    c = first;
    text.remove_prefix(1);
    return true;
  }
  const size_t length = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4 || text.size() < length) return false;
  c = first & (0x7F >> length);
  for (size_t i = 1; i < length; ++i) {
    const auto next = static_cast<uint8_t>(text[i]);
    if ((next & 0xC0) != 0x80) return false;
    c = c << 6 | (next & 0x3F);
  }
  text.remove_prefix(length);
  constexpr uint32_t kSmallest[] = {0, 0, 0x80, 0x800, 0x10000};
  return c >= kSmallest[length] && c <= 0x10FFFF;
}

}  // namespace

bool IsPickleUtf8(std::string_view text) {
  uint32_t c = 0;
  while (!text.empty()) {
    if (!NextCharacter(text, c)) return false;
  }
  return true;
}

std::optional<std::string> DecodeRawUnicodeEscape(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    // A backslash before anything but u and U stands for itself.
    const size_t digits = text.starts_with("\\u") ? 4 : text.starts_with("\\U") ? 8 : 0;
    if (digits == 0) {
      AppendUtf8(out, static_cast<uint8_t>(text[0]));
      text.remove_prefix(1);
      continue;
    }
    uint32_t c = 0;
    if (text.size() < 2 + digits) return std::nullopt;
    const char* end = text.data() + 2 + digits;
    const auto [parsed, error] = std::from_chars(text.data() + 2, end, c, 16);
    if (error != std::errc() || parsed != end || c > 0x10FFFF) return std::nullopt;
    AppendUtf8(out, c);
    text.remove_prefix(2 + digits);
  }
  return out;
}

std::optional<std::string> EncodeLatin1(std::string_view utf8) {
  std::string out;
  uint32_t c = 0;
  while (!utf8.empty()) {
    if (!NextCharacter(utf8, c) || c > 0xFF) return std::nullopt;
    out.push_back(static_cast<char>(c));
  }
  return out;
}

}  // namespace hsdp_ckpt::pickle
