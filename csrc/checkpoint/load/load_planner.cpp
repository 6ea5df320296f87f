#include "checkpoint/load/load_planner.h"

#include <algorithm>
#include <cerrno>

#include "base/error.h"
#include "base/parallel.h"
#include "format/record_dtype.h"
#include "io/file.h"

namespace hsdp_ckpt::checkpoint {
namespace {

// How much longer a tensor may be than its record where only torch can rebuild it: bits for
// elements of 8 bytes.
constexpr uint64_t kLenience = 64;

bool IsEmpty(const format::Shape& sizes) {
  return std::find(sizes.begin(), sizes.end(), 0) != sizes.end();
}

bool HasTransforms(const format::StorageInfo& place) {
  return place.transform_descriptors && !place.transform_descriptors->empty();
}

uint64_t LengthOf(const format::StorageInfo& place) {
  return static_cast<uint64_t>(std::max<int64_t>(place.length, 0));
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

bool Meet(const format::ChunkMetadata& chunk, const Box& box) {
  if (IsEmpty(chunk.sizes)) return false;
  for (size_t d = 0; d < box.sizes.size(); ++d) {
    const int64_t from = std::max(chunk.offsets[d], box.offsets[d]);
    const int64_t to = std::min(chunk.offsets[d] + chunk.sizes[d], box.offsets[d] + box.sizes[d]);
    if (from >= to) return false;
  }
  return true;
}

// What a chunk gives to a box that it meets.
ChunkRead Intersection(const format::ChunkMetadata& chunk, const Box& box,
                       const format::StorageInfo& place) {
  const size_t dimensions = box.sizes.size();
  ChunkRead read{&place, format::Shape(dimensions), format::Shape(dimensions),
                 format::Shape(dimensions)};
  for (size_t d = 0; d < dimensions; ++d) {
    const int64_t from = std::max(chunk.offsets[d], box.offsets[d]);
    const int64_t to = std::min(chunk.offsets[d] + chunk.sizes[d], box.offsets[d] + box.sizes[d]);
    read.in_record[d] = from - chunk.offsets[d];
    read.in_box[d] = from - box.offsets[d];
    read.sizes[d] = to - from;
  }
  return read;
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
    has_transforms_ = has_transforms_ || HasTransforms(storage[i].second);
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
  uint64_t covered = 0;
  for (const format::ChunkMetadata& chunk : tensor.chunks) {
    if (!Meet(chunk, box)) continue;
    reads.push_back(Intersection(chunk, box, PlaceOf(name, chunk.offsets)));
    covered += Volume(reads.back().sizes);
  }
  std::sort(reads.begin(), reads.end(),
            [](const ChunkRead& a, const ChunkRead& b) { return a.in_box < b.in_box; });
  CheckDisjoint(name, reads);
  if (covered != Volume(box.sizes)) {
    throw base::CorruptionError(path_, std::string(name),
                                "chunks that cover " + base::ShapeText(box.sizes) + " at " +
                                    base::ShapeText(box.offsets) + " of " +
                                    base::ShapeText(tensor.size),
                                "some that cover " + std::to_string(covered) + " of its elements");
  }
  return reads;
}

// `reads` are sorted. Most of them lie side by side in the first dimension: only those that share
// rows are compared.
void LoadPlanner::CheckDisjoint(std::string_view name, std::span<const ChunkRead> reads) const {
  if (reads.empty() || reads[0].sizes.empty()) return;
  for (size_t i = 0; i < reads.size(); ++i) {
    const int64_t end_of_rows = reads[i].in_box[0] + reads[i].sizes[0];
    for (size_t j = i + 1; j < reads.size() && reads[j].in_box[0] < end_of_rows; ++j) {
      if (!Overlap(reads[i], reads[j])) continue;
      throw base::CorruptionError(path_, std::string(name), "chunks that do not overlap",
                                  "two that do, of " + base::ShapeText(reads[i].sizes) + " and " +
                                      base::ShapeText(reads[j].sizes) + " elements");
    }
  }
}

void LoadPlanner::CheckCovered(std::string_view name) const {
  const format::EntryMetadata* entry = Find(name);
  const auto* tensor = entry == nullptr ? nullptr : std::get_if<format::TensorMetadata>(entry);
  if (tensor != nullptr) Plan(name, {format::Shape(tensor->size.size()), tensor->size});
}

void LoadPlanner::CheckSizes(io::FileSystem& fs, const std::string& directory,
                             SizeCheck check) const {
  if (!metadata_.storage_data) return;
  const std::vector<FileUse> files = FilesUsed();
  for (const auto& [name, entry] : metadata_.state_dict_metadata) {
    const auto* tensor = std::get_if<format::TensorMetadata>(&entry);
    if (tensor != nullptr) CheckTensorSize(name, *tensor, check);
  }
  base::ParallelFor(files.size(), 8,
                    [&](size_t i) { CheckFileSize(fs, directory, files[i], check); });
}

// The sums are at most 2**64 - 1, which more than that counts as.
std::vector<LoadPlanner::FileUse> LoadPlanner::FilesUsed() const {
  std::unordered_map<std::string_view, FileUse> files;
  for (const auto& [index, place] : *metadata_.storage_data) {
    const FileUse unused{&place.relative_path, &index.fqn, 0};
    FileUse& use = files.try_emplace(place.relative_path, unused).first->second;
    if (__builtin_add_overflow(use.bytes, LengthOf(place), &use.bytes)) use.bytes = UINT64_MAX;
  }
  std::vector<FileUse> list;
  list.reserve(files.size());
  for (const auto& [name, use] : files) list.push_back(use);
  return list;
}

LoadPlanner::RecordsOfTensor LoadPlanner::RecordsOf(std::string_view name) const {
  RecordsOfTensor sum;
  const auto list = records_.find(name);
  if (list == records_.end()) return sum;
  for (const uint32_t i : list->second) {
    const format::StorageInfo& place = (*metadata_.storage_data)[i].second;
    // The sum of a file's records, which is compared with the file, has not overflowed where this
    // one does.
    sum.bytes += LengthOf(place);
    sum.has_transforms = sum.has_transforms || HasTransforms(place);
  }
  return sum;
}

// That the tensor is not longer than its records.
void LoadPlanner::CheckTensorSize(const std::string& name, const format::TensorMetadata& tensor,
                                  SizeCheck check) const {
  const bool lenient = check == SizeCheck::kLenient;
  if (lenient && tensor.properties.layout != format::Layout::k_strided) return;
  const std::string dtype_name(format::Name(tensor.properties.dtype));
  const format::RecordDtype* dtype = format::FindRecordDtype(dtype_name);
  const uint64_t unit = dtype == nullptr ? 1 : dtype->size;
  uint64_t needed = 0;
  if (__builtin_mul_overflow(Volume(tensor.size), unit, &needed)) needed = UINT64_MAX;
  // A dtype that has no records of ours may have elements of a bit.
  uint64_t factor = dtype == nullptr ? 8 : 1;
  if (lenient) factor = kLenience;
  const RecordsOfTensor records = RecordsOf(name);
  // An extension may have made a record as short as it likes.
  if (records.has_transforms || needed / factor <= records.bytes) return;
  const std::string least = needed == UINT64_MAX ? "2**64" : std::to_string(needed);
  throw base::CorruptionError(path_, name,
                              "records of " + least + " bytes or more for " + dtype_name + " " +
                                  base::ShapeText(tensor.size),
                              "some of " + std::to_string(records.bytes));
}

// That the file is as long as its records together.
void LoadPlanner::CheckFileSize(io::FileSystem& fs, const std::string& directory,
                                const FileUse& use, SizeCheck check) {
  const bool lenient = check == SizeCheck::kLenient;
  const std::string path = io::JoinPath(directory, *use.file);
  io::FileStatus status;
  if (!io::GetStatus(fs, path, &status)) {
    if (lenient) return;
    throw base::IoError("open", path, -1, ENOENT);
  }
  const uint64_t factor = lenient ? kLenience : 1;
  if (use.bytes / factor <= static_cast<uint64_t>(status.size)) return;
  throw base::CorruptionError(path, *use.record,
                              "a file of " + std::to_string(use.bytes) +
                                  " bytes or more, as the lengths in .metadata add up",
                              "one of " + std::to_string(status.size));
}

}  // namespace hsdp_ckpt::checkpoint
