#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "format/record_dtype.h"

namespace hsdp_ckpt::format {

/// A dense tensor as its record's data.pkl describes it. Sizes, strides and the offset are in
/// elements.
struct TensorDescription {
  const RecordDtype* dtype = nullptr;
  std::vector<int64_t> shape;
  std::vector<int64_t> stride;
  int64_t storage_offset = 0;
  int64_t storage_bytes = 0;  ///< size of entry data/0

  friend bool operator==(const TensorDescription&, const TensorDescription&) = default;
};

/// Bytes of a contiguous tensor. Throws Error on a negative size and where the product does not fit
/// into 63 bits.
int64_t TensorBytes(const RecordDtype& dtype, std::span<const int64_t> shape);
/// A contiguous tensor that is all of its storage, with the strides torch gives it.
TensorDescription ContiguousTensor(const RecordDtype& dtype, std::span<const int64_t> shape);

/// data.pkl of a plain tensor: what torch.save writes, byte for byte (pickle protocol 2).
std::vector<std::byte> EncodeTensorPickle(const TensorDescription& tensor);

/// The reverse, for pickles of plain tensors only: whatever is anything else (another class, hooks,
/// sharing, more than one storage, a big-endian or a GPU-only description we don't know) gives
/// nullopt, and the caller hands the record to torch. Nothing is executed or looked up. The tensor
/// that comes back lies within its storage.
std::optional<TensorDescription> DecodeTensorPickle(std::span<const std::byte> pickle);

}  // namespace hsdp_ckpt::format
