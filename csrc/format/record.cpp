#include "format/record.h"

#include "base/bytes.h"
#include "base/crc32.h"
#include "format/tensor_pickle.h"
#include "format/zip.h"

namespace hsdp_ckpt::format {
namespace {

// torch.load takes everything before the first slash of the first name as the archive's own name.
const std::string kPayloadName = "archive/data/0";

struct Framing {
  base::ByteWriter head;
  std::vector<ZipEntry> entries;  // the payload's is the last; its CRC is yet to come
};

Framing MakeHead(const RecordDtype& dtype, std::span<const int64_t> shape) {
  Framing out;
  const TensorDescription tensor = ContiguousTensor(dtype, shape);
  const auto pickle = EncodeTensorPickle(tensor);
  const std::pair<const char*, std::span<const std::byte>> small[] = {
      {"archive/data.pkl", pickle},
      {"archive/byteorder", base::AsBytes("little")},
      {"archive/version", base::AsBytes("3\n")}};
  for (const auto& [name, bytes] : small) {
    ZipEntry entry{name, out.head.size(), 0, bytes.size(), base::Crc32(bytes)};
    PutZipLocalHeader(out.head, entry, /*descriptor_follows=*/false, 0);
    entry.data_offset = out.head.size();
    out.head.Put(bytes);
    out.entries.push_back(entry);
  }
  ZipEntry payload{kPayloadName, out.head.size(), 0, static_cast<uint64_t>(tensor.storage_bytes),
                   0};
  base::ByteWriter unpadded;
  PutZipLocalHeader(unpadded, payload, true, 0);
  // The padding is an extra field, which has a header of 4 bytes itself.
  const size_t used = out.head.size() + unpadded.size() + 4;
  const size_t padding = 4 + (kSmallAlignment - used % kSmallAlignment) % kSmallAlignment;
  PutZipLocalHeader(out.head, payload, true, padding);
  payload.data_offset = out.head.size();
  out.entries.push_back(payload);
  return out;
}

std::vector<std::byte> MakeTail(Framing framing, uint32_t payload_crc) {
  ZipEntry& payload = framing.entries.back();
  payload.crc = payload_crc;
  base::ByteWriter out;
  PutZipDataDescriptor(out, payload);
  PutZipDirectory(out, framing.entries, payload.data_offset + payload.size + out.size(),
                  kPayloadName);
  return out.Take();
}

}  // namespace

RecordSize SizeOfRecord(const RecordDtype& dtype, std::span<const int64_t> shape) {
  Framing framing = MakeHead(dtype, shape);
  const auto head = static_cast<int64_t>(framing.head.size());
  return {head, TensorBytes(dtype, shape),
          static_cast<int64_t>(MakeTail(std::move(framing), 0).size())};
}

int64_t RecordStart(int64_t position, const RecordSize& size) {
  const int64_t alignment = size.payload >= kLargePayload ? kLargeAlignment : kSmallAlignment;
  return (position + size.head + alignment - 1) / alignment * alignment - size.head;
}

std::vector<std::byte> EncodeRecordHead(const RecordDtype& dtype, std::span<const int64_t> shape) {
  return MakeHead(dtype, shape).head.Take();
}

std::vector<std::byte> EncodeRecordTail(const RecordDtype& dtype, std::span<const int64_t> shape,
                                        uint32_t payload_crc) {
  return MakeTail(MakeHead(dtype, shape), payload_crc);
}

}  // namespace hsdp_ckpt::format
