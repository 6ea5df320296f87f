// Any bytes at all as a data file of stock torch, as a record's pickle and as one of our own files'
// indexes: an answer or one of our exceptions, and what is accepted lies within the bytes. The
// first byte says which.
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "base/bytes.h"
#include "base/crc32.h"
#include "base/error.h"
#include "format/file_index.h"
#include "format/record.h"
#include "format/tensor_pickle.h"
#include "format/zip.h"

namespace hsdp_ckpt {
namespace {

void Require(bool holds) {
  if (!holds) std::abort();
}

void CheckTensor(const format::TensorDescription& tensor) {
  int64_t last = tensor.storage_offset;
  bool empty = false;
  Require(tensor.shape.size() == tensor.stride.size() && tensor.storage_offset >= 0);
  for (size_t i = 0; i < tensor.shape.size(); ++i) {
    if (tensor.shape[i] == 0) {
      empty = true;
      continue;
    }
    // UBSan sees an overflow that the decoder has let through.
    last += (tensor.shape[i] - 1) * tensor.stride[i];
  }
  Require(empty || last < tensor.storage_bytes / tensor.dtype->size);
}

void Zip(std::span<const std::byte> input) {
  const auto source = [&](std::span<std::byte> target, uint64_t offset) {
    Require(offset <= input.size() && target.size() <= input.size() - offset);
    std::copy_n(input.data() + offset, target.size(), target.data());
  };
  for (const format::ZipEntry& entry :
       format::ReadZipDirectory(source, input.size(), "fuzz", "fuzz")) {
    Require(entry.data_offset <= input.size() && entry.size <= input.size() - entry.data_offset);
    const auto tensor = format::DecodeTensorPickle(input.subspan(entry.data_offset, entry.size));
    if (tensor) CheckTensor(*tensor);
  }
}

void Pickle(std::span<const std::byte> input) {
  if (const auto tensor = format::DecodeTensorPickle(input)) {
    CheckTensor(*tensor);
    // No int of a tensor's is left out, so writing it and reading it again gives the same.
    Require(format::DecodeTensorPickle(format::EncodeTensorPickle(*tensor)) == tensor);
  }
}

void Index(std::span<const std::byte> input) {
  // Behind the checksums, which a fuzzer can't guess: the bytes are an index for records that end
  // at a place they choose.
  base::ByteReader in(input, "fuzz", "fuzz");
  format::IndexPlace place;
  const auto offset_and_version = in.Get<uint64_t>();
  place.offset = static_cast<int64_t>(offset_and_version >> 1);
  place.version = offset_and_version % 2 == 0 ? 1 : 2;
  place.records = in.Get<uint8_t>();
  const auto bytes = in.Get(in.remaining());
  place.size = static_cast<int64_t>(bytes.size());
  place.crc = base::Crc32(bytes);
  const format::FileIndex index = format::DecodeIndex(bytes, place, "fuzz");
  int64_t end = 0;
  for (const format::IndexEntry& entry : index.entries) {
    Require(entry.offset >= end && entry.end() <= place.offset);
    end = entry.end();
    if (entry.dtype != nullptr) CheckTensor(format::ContiguousTensor(*entry.dtype, entry.shape));
    Require(entry.block_crcs.size() == static_cast<uint64_t>(entry.payload) / base::kChecksumBlock +
                                           (entry.payload % base::kChecksumBlock != 0 ? 1 : 0));
  }
  // Only the newer version is written.
  if (place.offset > INT64_MAX / 2 || place.version == 1) return;
  format::IndexEncoder encoder;
  for (const format::IndexEntry& entry : index.entries) encoder.Add(entry);
  const auto again = encoder.Finish(index.save_id, place.offset);
  Require(std::equal(bytes.begin(), bytes.end(), again.begin()));
}

void Tail(std::span<const std::byte> input) {
  if (input.size() != format::kIndexTail) return;
  // The tail's own checksum is set right, the rest is the fuzzer's.
  std::vector<std::byte> tail(input.begin(), input.end());
  const uint32_t crc = base::Crc32(std::span(tail).first(52));
  for (size_t i = 0; i < 4; ++i) tail[52 + i] = static_cast<std::byte>(crc >> (8 * i));
  base::ByteReader in(tail, "fuzz", "fuzz");
  const auto size = static_cast<int64_t>(in.Get<uint64_t>() >> 1);
  const format::IndexPlace place = format::DecodeIndexTail(tail, size, "fuzz");
  Require(place.offset >= 0 && place.size >= 0 &&
          place.offset + place.size + format::kIndexTail == size);
}

}  // namespace
}  // namespace hsdp_ckpt

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const auto input = std::as_bytes(std::span(data + 1, size - 1));
  constexpr void (*kTargets[])(std::span<const std::byte>) = {hsdp_ckpt::Zip, hsdp_ckpt::Pickle,
                                                              hsdp_ckpt::Index, hsdp_ckpt::Tail};
  try {
    kTargets[data[0] % 4](input);
  } catch (const hsdp_ckpt::base::Error&) {
  }
  return 0;
}
