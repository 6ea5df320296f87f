#include "checkpoint/load/checkpoint_reader.h"

#include "base/error.h"
#include "base/parallel.h"

namespace hsdp_ckpt::checkpoint {
namespace {

// First element and number of elements of a box, if it is one range of a contiguous tensor.
std::optional<std::pair<int64_t, int64_t>> Range(const format::TensorDescription& tensor,
                                                 const ItemRequest& item) {
  int64_t first = tensor.storage_offset, count = 1, stride = 1;
  bool whole = true;  // all dimensions behind this one are taken in full
  for (size_t d = tensor.shape.size(); d-- > 0;) {
    const int64_t length = item.box_lengths[d];
    if (tensor.shape[d] != 1 && tensor.stride[d] != stride) return std::nullopt;
    if (!whole && length != 1) return std::nullopt;
    whole = whole && length == tensor.shape[d];
    first += item.box_offsets[d] * stride;
    count *= length;
    stride *= tensor.shape[d];
  }
  return std::pair(first, count);
}

}  // namespace

std::vector<uint32_t> CheckpointReader::Open(std::span<const std::string> names, int threads) {
  std::vector<std::string> missing;
  std::unordered_map<std::string, uint32_t> added;
  for (const std::string& name : names) {
    if (numbers_.contains(name)) continue;
    if (added.emplace(name, static_cast<uint32_t>(files_.size() + missing.size())).second)
      missing.push_back(name);
  }
  std::vector<std::unique_ptr<ShardFileReader>> opened(missing.size());
  base::ParallelFor(missing.size(), threads, [&](size_t i) {
    opened[i] = std::make_unique<ShardFileReader>(fs_, directory_, missing[i], direct_);
  });
  for (auto& file : opened) files_.push_back(std::move(file));
  numbers_.merge(added);
  std::vector<uint32_t> out;
  out.reserve(names.size());
  for (const std::string& name : names) out.push_back(numbers_.at(name));
  return out;
}

ItemAnswer CheckpointReader::Answer(const ItemRequest& item) {
  ShardFileReader& file = *files_.at(item.file);
  ItemAnswer answer;
  auto tensor = file.Describe(item.name, item.offset, item.length);
  if (!tensor) return answer;
  bool fits = item.box_offsets.size() == tensor->shape.size() &&
              item.box_lengths.size() == tensor->shape.size();
  for (size_t d = 0; fits && d < tensor->shape.size(); ++d) {
    fits = item.box_offsets[d] >= 0 && item.box_lengths[d] >= 0 &&
           item.box_offsets[d] <= tensor->shape[d] &&
           item.box_lengths[d] <= tensor->shape[d] - item.box_offsets[d];
  }
  if (!fits) {
    throw base::CorruptionError(file.file().path(), item.name,
                                "a record that holds " + base::ShapeText(item.box_lengths) +
                                    " from " + base::ShapeText(item.box_offsets),
                                "one of shape " + base::ShapeText(tensor->shape));
  }
  const auto range = item.target_dtype == tensor->dtype ? Range(*tensor, item) : std::nullopt;
  if (range) {
    const int64_t unit = tensor->dtype->size;
    answer.kind = ItemAnswer::Kind::kLands;
    answer.read = {item.file,
                   {item.name, item.offset, item.length, range->first * unit, range->second * unit,
                    item.target}};
  } else {
    answer.kind = ItemAnswer::Kind::kStaged;
    answer.tensor = std::move(*tensor);
  }
  return answer;
}

std::vector<ItemAnswer> CheckpointReader::Resolve(std::span<const ItemRequest> items, int threads) {
  // Describing a stock record reads a little of its file: the files in parallel, each by one thread
  // and in its order.
  std::vector<std::vector<uint32_t>> by_file(files_.size());
  for (size_t i = 0; i < items.size(); ++i)
    by_file.at(items[i].file).push_back(static_cast<uint32_t>(i));
  std::vector<ItemAnswer> answers(items.size());
  base::ParallelFor(by_file.size(), threads, [&](size_t f) {
    for (const uint32_t i : by_file[f]) answers[i] = Answer(items[i]);
  });
  return answers;
}

}  // namespace hsdp_ckpt::checkpoint
