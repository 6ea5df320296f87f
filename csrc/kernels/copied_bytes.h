#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/batched_copy.h"

namespace hsdp_ckpt::kernels {

/// What a batched call moves between one source element and one destination element.
struct MovedItems {
  size_t src;       ///< bytes of an element of a source
  size_t dst;       ///< bytes of an element of the destination
  bool accumulate;  ///< the destination is read too
};

#ifdef HSDP_CKPT_TESTS

/// Bytes that BatchedCopy and BatchedSum have read and written in this process so far, without
/// those of the wire: for tests, which hold a step to a number of them. Other builds count nothing.
int64_t CopiedBytes();

void CountCopy(std::span<const CopySegment> segments, MovedItems items);
void CountSum(std::span<const SumSegment> segments, MovedItems items);

#else

inline void CountCopy(std::span<const CopySegment>, MovedItems) {}
inline void CountSum(std::span<const SumSegment>, MovedItems) {}

#endif

}  // namespace hsdp_ckpt::kernels
