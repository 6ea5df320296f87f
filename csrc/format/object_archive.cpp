#include "format/object_archive.h"

#include <algorithm>
#include <string_view>

#include "base/bytes.h"
#include "base/error.h"
#include "format/zip.h"
#include "pickle/text.h"

namespace hsdp_ckpt::format {
namespace {

constexpr std::string_view kZipBegin("PK\3\4");

std::string LowerCase(std::string text) {
  const auto lower = [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; };
  std::transform(text.begin(), text.end(), text.begin(), lower);
  return text;
}

std::vector<ZipEntry> Entries(std::span<const std::byte> data, const std::string& what) {
  const auto source = [&](std::span<std::byte> target, uint64_t at) {
    std::copy_n(data.begin() + static_cast<std::ptrdiff_t>(at), target.size(), target.begin());
  };
  return ReadZipDirectory(source, data.size(), what, "the object");
}

// Torch finds an entry by what follows the first slash, in upper or lower case.
std::string EntryKey(const ZipEntry& entry) {
  const size_t slash = entry.name.find('/');
  return slash == std::string::npos ? "" : LowerCase(entry.name.substr(slash + 1));
}

}  // namespace

std::optional<std::map<std::string, ArchiveEntry>> ReadObjectArchive(
    std::span<const std::byte> data, const std::string& what) {
  if (!base::AsText(data).starts_with(kZipBegin)) return std::nullopt;
  const std::string problem = what + ": the object is not loaded";
  std::map<std::string, ArchiveEntry> entries;
  for (const ZipEntry& entry : Entries(data, what)) {
    if (!pickle::IsPickleUtf8(entry.name))
      throw base::CorruptionError(problem, "one of its entries has a name that is not UTF-8");
    const ArchiveEntry place{entry.data_offset, entry.size};
    if (!entries.emplace(EntryKey(entry), place).second)
      throw base::CorruptionError(problem, "two of its entries have one name");
  }
  return entries;
}

}  // namespace hsdp_ckpt::format
