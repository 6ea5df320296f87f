#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "format/metadata.h"

namespace hsdp_ckpt::checkpoint {

/// A box of a tensor that one rank writes as one record. It is contiguous in the rank's local
/// shard.
struct PlannedChunk {
  size_t tensor = 0;
  format::Shape offsets;  ///< in the whole tensor
  format::Shape sizes;
};

/// Chunks, without a block of memory for each.
class ChunkList {
 public:
  void Add(size_t tensor, const format::Shape& offsets, const format::Shape& sizes);
  void Append(const ChunkList& other);
  size_t size() const { return heads_.size(); }
  bool empty() const { return heads_.empty(); }
  size_t tensor(size_t i) const { return heads_[i].tensor; }
  PlannedChunk operator[](size_t i) const;

  struct Iterator {
    const ChunkList* list;
    size_t at;
    PlannedChunk operator*() const { return (*list)[at]; }
    Iterator& operator++() { return ++at, *this; }
    bool operator!=(const Iterator& other) const { return at != other.at; }
  };
  Iterator begin() const { return {this, 0}; }
  Iterator end() const { return {this, size()}; }

 private:
  struct Head {
    uint32_t tensor;
    uint32_t dimensions;
    size_t first;
  };
  std::vector<Head> heads_;
  std::vector<int64_t> numbers_;  // offsets, then sizes
};

}  // namespace hsdp_ckpt::checkpoint
