#include "checkpoint/load/record_places.h"

#include <algorithm>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/error.h"

namespace hsdp_ckpt::checkpoint {
namespace {

struct Range {
  int64_t begin;
  int64_t end;
  uint32_t record;  // its number in the metadata
};

bool BeginsBefore(const Range& a, const Range& b) { return a.begin < b.begin; }

std::unordered_map<std::string_view, std::vector<Range>> RangesByFile(
    const format::Metadata& metadata) {
  std::unordered_map<std::string_view, std::vector<Range>> files;
  uint32_t number = 0;
  for (const auto& [index, place] : *metadata.storage_data) {
    const Range range{place.offset, place.offset + place.length, number++};
    if (place.length > 0) files[place.relative_path].push_back(range);
  }
  return files;
}

// What messages call a record.
std::string NameOf(const format::MetadataIndex& index) {
  return index.offset ? index.fqn + " at " + base::ShapeText(*index.offset) : index.fqn;
}

}  // namespace

void CheckRecordsDisjoint(const format::Metadata& metadata, const std::string& path) {
  if (!metadata.storage_data) return;
  for (auto& [file, ranges] : RangesByFile(metadata)) {
    // Writers name them in the order of the file, so that there is mostly nothing to sort.
    if (!std::is_sorted(ranges.begin(), ranges.end(), BeginsBefore))
      std::sort(ranges.begin(), ranges.end(), BeginsBefore);
    const auto found =
        std::adjacent_find(ranges.begin(), ranges.end(),
                           [](const Range& a, const Range& b) { return b.begin < a.end; });
    if (found == ranges.end()) continue;
    const format::MetadataIndex& one = (*metadata.storage_data)[found[0].record].first;
    const format::MetadataIndex& other = (*metadata.storage_data)[found[1].record].first;
    throw base::CorruptionError(path, one.fqn,
                                "records that have bytes of their own in " + std::string(file),
                                NameOf(one) + " and " + NameOf(other) + " in the same place");
  }
}

}  // namespace hsdp_ckpt::checkpoint
