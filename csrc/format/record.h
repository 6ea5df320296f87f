#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "format/record_dtype.h"

namespace hsdp_ckpt::format {

/// One tensor as `torch.load(weights_only=True)` reads it: an uncompressed zip whose last entry is
/// the payload.
///
///   head     data.pkl, byteorder, version, and the payload's local header; a multiple of 64 bytes
///   payload  the elements, contiguous, little-endian
///   tail     data descriptor with the payload's CRC-32, central directory, end of central
///   directory
///
/// All sizes follow from dtype and shape alone, so every offset of a file is known before a byte of
/// it is. Only the tail depends on the payload, through its CRC.
struct RecordSize {
  int64_t head = 0;
  int64_t payload = 0;
  int64_t tail = 0;

  int64_t total() const { return head + payload + tail; }
};

/// Payloads of at least this many bytes start at a multiple of kLargeAlignment in the file, smaller
/// ones of kSmallAlignment.
constexpr int64_t kLargePayload = int64_t{1} << 20;
constexpr int64_t kLargeAlignment = 4096;
constexpr int64_t kSmallAlignment = 64;

RecordSize SizeOfRecord(const RecordDtype& dtype, std::span<const int64_t> shape);
/// Where a record may start, at `position` or after it, for its payload to be aligned.
int64_t RecordStart(int64_t position, const RecordSize& size);
std::vector<std::byte> EncodeRecordHead(const RecordDtype& dtype, std::span<const int64_t> shape);
std::vector<std::byte> EncodeRecordTail(const RecordDtype& dtype, std::span<const int64_t> shape,
                                        uint32_t payload_crc);

}  // namespace hsdp_ckpt::format
