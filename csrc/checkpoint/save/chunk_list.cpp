#include "checkpoint/save/chunk_list.h"

namespace hsdp_ckpt::checkpoint {

void ChunkList::Add(size_t tensor, const format::Shape& offsets, const format::Shape& sizes) {
  heads_.push_back(
      {static_cast<uint32_t>(tensor), static_cast<uint32_t>(sizes.size()), numbers_.size()});
  numbers_.insert(numbers_.end(), offsets.begin(), offsets.end());
  numbers_.insert(numbers_.end(), sizes.begin(), sizes.end());
}

void ChunkList::Append(const ChunkList& other) {
  const size_t begin = numbers_.size();
  numbers_.insert(numbers_.end(), other.numbers_.begin(), other.numbers_.end());
  for (Head head : other.heads_) {
    head.first += begin;
    heads_.push_back(head);
  }
}

PlannedChunk ChunkList::operator[](size_t i) const {
  const Head& head = heads_[i];
  const auto first = numbers_.begin() + static_cast<std::ptrdiff_t>(head.first);
  const auto middle = first + head.dimensions;
  return {head.tensor, format::Shape(first, middle),
          format::Shape(middle, middle + head.dimensions)};
}

}  // namespace hsdp_ckpt::checkpoint
