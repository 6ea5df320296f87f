#include "checkpoint/load/load_planner.h"

#include <algorithm>
#include <cerrno>

#include "base/error.h"
#include "base/parallel.h"
#include "format/dtype.h"
#include "io/file.h"

namespace hsdp_ckpt::checkpoint {
namespace {

// How much longer a tensor may be than its record where only torch can rebuild it: bits for
// elements of 8 bytes.
constexpr uint64_t kLenience = 64;

bool IsEmpty(const format::Shape& sizes) {
  return std::find(sizes.begin(), sizes.end(), 0) != sizes.end();
}

// Elements of a box inside a tensor whose own number is at most 2**63; more are as good as that
// many.
uint64_t Volume(const format::Shape& sizes) {
  uint64_t volume = 1;
  for (const int64_t n : sizes) {
    if (__builtin_mul_overflow(volume, static_cast<uint64_t>(n), &volume)) return UINT64_MAX;
  }
  return volume;
}

bool Overlap(const ChunkRead& a, const ChunkRead& b) {
  for (size_t d = 0; d < a.sizes.size(); ++d) {
    if (a.in_box[d] >= b.in_box[d] + b.sizes[d] || b.in_box[d] >= a.in_box[d] + a.sizes[d])
      return false;
  }
  return true;
}

}  // namespace

LoadPlanner::LoadPlanner(format::Metadata metadata, std::string path)
    : metadata_(std::move(metadata)), path_(std::move(path)) {
  entries_.reserve(metadata_.state_dict_metadata.size());
  for (size_t i = 0; i < metadata_.state_dict_metadata.size(); ++i)
    entries_.emplace(metadata_.state_dict_metadata[i].first, i);
  if (!metadata_.storage_data) return;
  const auto& storage = *metadata_.storage_data;
  records_.reserve(entries_.size());
  for (uint32_t i = 0; i < storage.size(); ++i) {
    records_[storage[i].first.fqn].push_back(i);
    has_transforms_ = has_transforms_ || (storage[i].second.transform_descriptors &&
                                          !storage[i].second.transform_descriptors->empty());
  }
  for (auto& [name, list] : records_) {
    std::sort(list.begin(), list.end(), [&](uint32_t a, uint32_t b) {
      return storage[a].first.offset < storage[b].first.offset;
    });
  }
}

const format::EntryMetadata* LoadPlanner::Find(std::string_view name) const {
  const auto found = entries_.find(name);
  return found == entries_.end() ? nullptr : &metadata_.state_dict_metadata[found->second].second;
}

const format::StorageInfo& LoadPlanner::PlaceOf(std::string_view name,
                                                const std::optional<format::Shape>& offset) const {
  const auto list = records_.find(name);
  if (list != records_.end()) {
    const auto& storage = *metadata_.storage_data;
    const auto found =
        std::lower_bound(list->second.begin(), list->second.end(), offset,
                         [&](uint32_t i, const auto& at) { return storage[i].first.offset < at; });
    if (found != list->second.end() && storage[*found].first.offset == offset)
      return storage[*found].second;
  }
  const std::string chunk = offset ? " for the chunk at " + base::ShapeText(*offset) : "";
  throw base::CorruptionError(path_, std::string(name), "a record" + chunk, "none");
}

const format::StorageInfo& LoadPlanner::PlaceOfObject(std::string_view name) const {
  return PlaceOf(name, std::nullopt);
}

std::vector<ChunkRead> LoadPlanner::Plan(std::string_view name, const Box& box) const {
  const auto& tensor = std::get<format::TensorMetadata>(*Find(name));
  std::vector<ChunkRead> reads;
  if (IsEmpty(box.sizes)) return reads;
  const size_t dimensions = box.sizes.size();
  uint64_t covered = 0;
  ChunkRead read{nullptr, format::Shape(dimensions), format::Shape(dimensions),
                 format::Shape(dimensions)};
  for (const format::ChunkMetadata& chunk : tensor.chunks) {
    bool meets = !IsEmpty(chunk.sizes);
    for (size_t d = 0; meets && d < dimensions; ++d) {
      const int64_t from = std::max(chunk.offsets[d], box.offsets[d]);
      const int64_t to = std::min(chunk.offsets[d] + chunk.sizes[d], box.offsets[d] + box.sizes[d]);
      meets = from < to;
      read.in_record[d] = from - chunk.offsets[d];
      read.in_box[d] = from - box.offsets[d];
      read.sizes[d] = to - from;
    }
    if (!meets) continue;
    read.place = &PlaceOf(name, chunk.offsets);
    covered += Volume(read.sizes);
    reads.push_back(read);
  }
  // Side by side in the first dimension most of them: only those that share rows are compared.
  std::sort(reads.begin(), reads.end(),
            [](const ChunkRead& a, const ChunkRead& b) { return a.in_box < b.in_box; });
  for (size_t i = 0; i < reads.size(); ++i) {
    for (size_t j = i + 1; j < reads.size() && dimensions > 0 &&
                           reads[j].in_box[0] < reads[i].in_box[0] + reads[i].sizes[0];
         ++j) {
      if (!Overlap(reads[i], reads[j])) continue;
      throw base::CorruptionError(path_, std::string(name), "chunks that do not overlap",
                                  "two that do, of " + base::ShapeText(reads[i].sizes) + " and " +
                                      base::ShapeText(reads[j].sizes) + " elements");
    }
  }
  if (covered != Volume(box.sizes)) {
    throw base::CorruptionError(path_, std::string(name),
                                "chunks that cover " + base::ShapeText(box.sizes) + " at " +
                                    base::ShapeText(box.offsets) + " of " +
                                    base::ShapeText(tensor.size),
                                "some that cover " + std::to_string(covered) + " of its elements");
  }
  return reads;
}

void LoadPlanner::CheckExplained(io::FileSystem& fs, const std::string& directory,
                                 bool lenient) const {
  if (!metadata_.storage_data) return;
  const auto& storage = *metadata_.storage_data;
  struct Used {
    uint64_t bytes = 0;
    const std::string* name;  // of one record in it, for messages
  };
  std::unordered_map<std::string_view, Used> files;
  for (const auto& [index, place] : storage) {
    Used& used = files.try_emplace(place.relative_path, Used{0, &index.fqn}).first->second;
    if (__builtin_add_overflow(
            used.bytes, static_cast<uint64_t>(std::max<int64_t>(place.length, 0)), &used.bytes))
      used.bytes = UINT64_MAX;
  }
  for (const auto& [name, entry] : metadata_.state_dict_metadata) {
    const auto* tensor = std::get_if<format::TensorMetadata>(&entry);
    const format::DType* dtype =
        tensor == nullptr ? nullptr : format::FindDType(format::Name(tensor->properties.dtype));
    if (tensor == nullptr || (lenient && tensor->properties.layout != format::Layout::k_strided))
      continue;
    uint64_t bytes = 0, needed = 0;
    bool encoded = false;  // an extension may have made a record as short as it likes
    if (const auto list = records_.find(name); list != records_.end()) {
      for (const uint32_t i : list->second) {
        const format::StorageInfo& place = storage[i].second;
        // The sum of a file's records, which is compared below, has not overflowed where this does.
        bytes += static_cast<uint64_t>(std::max<int64_t>(place.length, 0));
        encoded = encoded || (place.transform_descriptors && !place.transform_descriptors->empty());
      }
    }
    // A dtype that has no records of ours may have elements of a bit.
    const uint64_t unit = dtype == nullptr ? 1 : dtype->size, factor = lenient ? kLenience
                                                                       : dtype == nullptr ? 8
                                                                                          : 1;
    if (__builtin_mul_overflow(Volume(tensor->size), unit, &needed)) needed = UINT64_MAX;
    if (!encoded && needed / factor > bytes) {
      throw base::CorruptionError(
          path_, name,
          "records of " + (needed == UINT64_MAX ? "2**64" : std::to_string(needed)) +
              " bytes or more for " + std::string(format::Name(tensor->properties.dtype)) + " " +
              base::ShapeText(tensor->size),
          "some of " + std::to_string(bytes));
    }
  }
  const std::vector<std::pair<std::string_view, Used>> list(files.begin(), files.end());
  base::ParallelFor(list.size(), 8, [&](size_t i) {
    const auto& [file, used] = list[i];
    const std::string path = io::JoinPath(directory, std::string(file));
    io::FileStatus status;
    if (!io::GetStatus(fs, path, &status)) {
      if (lenient) return;
      throw base::IoError("open", path, -1, ENOENT);
    }
    if (used.bytes / (lenient ? kLenience : 1) > static_cast<uint64_t>(status.size)) {
      throw base::CorruptionError(path, *used.name,
                                  "a file of " + std::to_string(used.bytes) +
                                      " bytes or more, as the lengths in .metadata add up",
                                  "one of " + std::to_string(status.size));
    }
  });
}

}  // namespace hsdp_ckpt::checkpoint
