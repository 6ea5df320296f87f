#include "format/saved_object.h"

#include <algorithm>

#include "base/bytes.h"
#include "base/error.h"
#include "format/zip.h"
#include "pickle/object_check.h"
#include "pickle/text.h"

namespace hsdp_ckpt::format {
namespace {

constexpr uint64_t kTimes = 4;     // an array passes through text and bytes on its way
constexpr int kLegacyPickles = 5;  // magic, version, system, object, storage keys
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

pickle::EntrySizes SizesByKey(const std::vector<ZipEntry>& entries, const std::string& problem) {
  pickle::EntrySizes sizes;
  for (const ZipEntry& entry : entries) {
    if (!pickle::IsPickleUtf8(entry.name))
      throw base::CorruptionError(problem, "one of its entries has a name that is not UTF-8");
    if (!sizes.emplace(EntryKey(entry), entry.size).second)
      throw base::CorruptionError(problem, "two of its entries have one name");
  }
  return sizes;
}

}  // namespace

void CheckSavedObject(std::span<const std::byte> data, const std::string& what,
                      const pickle::TorchNames& names) {
  const std::string problem = what + ": the object is not loaded";
  const uint64_t limit = kTimes * data.size();
  const bool calls = pickle::NamesGlobal(data);  // else running it is not worth the time
  if (base::AsText(data).starts_with(kZipBegin)) {
    const std::vector<ZipEntry> entries = Entries(data, what);
    const pickle::EntrySizes sizes = SizesByKey(entries, problem);
    for (const ZipEntry& entry : entries) {
      if (!calls || !LowerCase(entry.name).ends_with("data.pkl")) continue;
      pickle::ObjectCosts costs(names, problem, limit, &sizes);
      pickle::CheckPickle(data.subspan(entry.data_offset, entry.size), costs);
    }
  } else if (calls) {  // one pickle after the other; what follows them are the tensors' bytes
    pickle::ObjectCosts costs(names, problem, limit, nullptr);
    for (int i = 0; i < kLegacyPickles; ++i) data = data.subspan(pickle::CheckPickle(data, costs));
  }
}

}  // namespace hsdp_ckpt::format
