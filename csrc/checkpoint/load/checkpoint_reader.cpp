#include "checkpoint/load/checkpoint_reader.h"

#include "base/error.h"
#include "base/parallel.h"

namespace hsdp_ckpt::checkpoint {
namespace {

struct ElementRange {
  int64_t first = 0;
  int64_t count = 0;
};

bool LiesWithin(const BoxRead& box, const std::vector<int64_t>& shape) {
  if (box.offsets.size() != shape.size() || box.lengths.size() != shape.size()) return false;
  for (size_t d = 0; d < shape.size(); ++d) {
    if (box.offsets[d] < 0 || box.lengths[d] < 0 || box.offsets[d] > shape[d]) return false;
    if (box.lengths[d] > shape[d] - box.offsets[d]) return false;
  }
  return true;
}

// The elements of a box, if they are one range of a contiguous tensor.
std::optional<ElementRange> RangeOf(const format::TensorDescription& tensor, const BoxRead& box) {
  ElementRange range{tensor.storage_offset, 1};
  int64_t stride = 1;
  bool whole = true;  // all dimensions behind this one are taken in full
  for (size_t d = tensor.shape.size(); d-- > 0;) {
    const int64_t length = box.lengths[d];
    if (tensor.shape[d] != 1 && tensor.stride[d] != stride) return std::nullopt;
    if (!whole && length != 1) return std::nullopt;
    whole = whole && length == tensor.shape[d];
    range.first += box.offsets[d] * stride;
    range.count *= length;
    stride *= tensor.shape[d];
  }
  return range;
}

}  // namespace

void CheckpointReader::Open(std::span<const std::string> names, int threads) {
  std::vector<std::string> missing;
  std::unordered_map<std::string, uint32_t> added;
  for (const std::string& name : names) {
    if (numbers_.contains(name)) continue;
    const auto number = static_cast<uint32_t>(files_.size() + missing.size());
    if (added.emplace(name, number).second) missing.push_back(name);
  }
  std::vector<std::unique_ptr<ShardFileReader>> opened(missing.size());
  base::ParallelFor(missing.size(), threads, [&](size_t i) {
    opened[i] = std::make_unique<ShardFileReader>(pool_, directory_, missing[i], direct_);
  });
  for (auto& file : opened) files_.push_back(std::move(file));
  numbers_.merge(added);
}

uint32_t CheckpointReader::NumberOf(const std::string& file) const { return numbers_.at(file); }

BoxStrategy CheckpointReader::ResolveOne(const BoxRead& box, uint32_t file) {
  const RecordPlace& record = box.record;
  ShardFileReader& reader = *files_[file];
  auto tensor = reader.Describe(record.name, record.offset, record.length, record.owner);
  BoxStrategy strategy;
  if (!tensor) return strategy;
  if (!LiesWithin(box, tensor->shape)) {
    throw base::CorruptionError(reader.file().path(), record.name,
                                "a record that holds " + base::ShapeText(box.lengths) + " from " +
                                    base::ShapeText(box.offsets),
                                "one of shape " + base::ShapeText(tensor->shape));
  }
  const auto range = box.target_dtype == tensor->dtype ? RangeOf(*tensor, box) : std::nullopt;
  if (!range) {
    strategy.kind = BoxStrategy::Kind::kStaged;
    strategy.tensor = std::move(*tensor);
    return strategy;
  }
  const int64_t unit = tensor->dtype->size;
  strategy.kind = BoxStrategy::Kind::kInPlace;
  strategy.read.file = file;
  strategy.read.read = {record.name,         record.offset,       record.length,
                        range->first * unit, range->count * unit, box.target};
  return strategy;
}

std::vector<BoxStrategy> CheckpointReader::Resolve(std::span<const BoxRead> boxes, int threads) {
  // Describing a stock record reads a little of its file: the files in parallel, each by one thread
  // and in its order.
  std::vector<std::vector<uint32_t>> by_file(files_.size());
  for (size_t i = 0; i < boxes.size(); ++i)
    by_file[NumberOf(boxes[i].record.file)].push_back(static_cast<uint32_t>(i));
  std::vector<BoxStrategy> strategies(boxes.size());
  base::ParallelFor(by_file.size(), threads, [&](size_t file) {
    for (const uint32_t i : by_file[file])
      strategies[i] = ResolveOne(boxes[i], static_cast<uint32_t>(file));
  });
  return strategies;
}

std::unique_ptr<ReadPlan> CheckpointReader::Plan(std::span<const RangeRead> ranges) const {
  std::vector<PlannedRead> reads;
  reads.reserve(ranges.size());
  for (const RangeRead& range : ranges) {
    const RecordPlace& record = range.record;
    reads.push_back(
        {NumberOf(record.file),
         {record.name, record.offset, record.length, range.first, range.size, range.target}});
  }
  return std::make_unique<ReadPlan>(files_, std::move(reads));
}

std::vector<std::vector<std::byte>> CheckpointReader::ReadObjects(
    std::span<const RecordPlace> objects, int threads) const {
  std::vector<std::vector<std::byte>> bytes(objects.size());
  base::ParallelFor(objects.size(), threads, [&](size_t i) {
    const RecordPlace& object = objects[i];
    const ShardFileReader& file = *files_[NumberOf(object.file)];
    bytes[i] = file.ReadBytes(object.name, object.offset, object.length, object.owner);
  });
  return bytes;
}

}  // namespace hsdp_ckpt::checkpoint
