#include "format/data_file_name.h"

#include <charconv>
#include <cstdio>
#include <random>
#include <regex>

namespace hsdp_ckpt::format {
namespace {

template <typename T>
T Number(const std::ssub_match& match, int base) {
  T value = 0;
  const std::string text = match.str();
  std::from_chars(text.data(), text.data() + text.size(), value, base);
  return value;
}

}  // namespace

std::string DataFileName::ToString() const {
  char text[160];
  std::snprintf(text, sizeof(text), "__%lld_%016llx_%08x_%08x_%lld_%llu%s_%lld.distcp",
                static_cast<long long>(rank), static_cast<unsigned long long>(save_id), owner.host,
                owner.boot, static_cast<long long>(owner.pid),
                static_cast<unsigned long long>(owner.start), by_torch ? "_torch" : "",
                static_cast<long long>(number));
  return text;
}

std::optional<DataFileName> DataFileName::Parse(const std::string& name) {
  static const auto& pattern =
      *new std::regex(R"(__(\d{1,9})_([0-9a-f]{16})_([0-9a-f]{8})_([0-9a-f]{8})_(\d{1,18})_)"
                      R"((\d{1,19})(_torch)?_(\d{1,18})\.distcp)");
  std::smatch match;
  if (!std::regex_match(name, match, pattern)) return std::nullopt;
  DataFileName out;
  out.rank = Number<int64_t>(match[1], 10);
  out.save_id = Number<uint64_t>(match[2], 16);
  out.owner = {Number<uint32_t>(match[3], 16), Number<uint32_t>(match[4], 16),
               Number<int64_t>(match[5], 10), Number<uint64_t>(match[6], 10)};
  out.by_torch = match[7].matched;
  out.number = Number<int64_t>(match[8], 10);
  // Leading zeros would give one file two names.
  return out.ToString() == name ? std::optional(out) : std::nullopt;
}

uint64_t NewSaveId(bool claimed) {
  std::random_device device;
  const uint64_t random = uint64_t{device()} << 32 | device();
  const uint64_t mark = claimed ? DataFileName::kClaimedMark : 0;
  return (random & ~DataFileName::kClaimedMask) | mark;
}

}  // namespace hsdp_ckpt::format
