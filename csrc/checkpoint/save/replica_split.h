#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "checkpoint/save/chunk_list.h"

namespace hsdp_ckpt::checkpoint {

/// A cut may be off the exact 1/R by half of this, and tensors are never cut closer to their ends
/// than kCutMargin.
inline constexpr int64_t kCutGrain = int64_t{1} << 20;
inline constexpr int64_t kCutMargin = int64_t{64} << 10;

/// The product of the sizes from dimension `from` on.
int64_t Product(const format::Shape& sizes, size_t from = 0);

/// Whether a tensor may be put together from several holders' parts.
enum class Cutting { kByRows, kWhole };

/// Deals the tensors of one shard, laid end to end, out to the replicas that hold it: each takes a
/// contiguous 1/R of the bytes, rounded to where tensors may be cut. Add the tensors in
/// their order, then take the chunks.
class ReplicaSplit {
 public:
  /// `bytes`: of all tensors together. `holders`: one or more.
  ReplicaSplit(int64_t bytes, size_t holders) : bytes_(bytes), chunks_(holders) {}

  /// A tensor's local box; `element`: bytes of one.
  void Add(const PlannedChunk& box, int64_t element, Cutting cutting);
  /// A box without elements, as one chunk.
  void AddEmpty(const PlannedChunk& box);
  /// What each holder writes.
  std::vector<ChunkList> TakeChunks() && { return std::move(chunks_); }

 private:
  bool IsLastHolder() const { return holder_ + 1 == chunks_.size(); }
  int64_t EndOfHolder() const;
  void AddRange(const PlannedChunk& box, int64_t element, int64_t from, int64_t to);

  const int64_t bytes_;
  std::vector<ChunkList> chunks_;  // by holder
  size_t holder_ = 0;              // the one that takes the next byte
  int64_t begin_ = 0;              // where the next tensor begins, in the shard's bytes
};

}  // namespace hsdp_ckpt::checkpoint
