#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "format/tensor_pickle.h"
#include "format/zip.h"
#include "io/file.h"

namespace hsdp_ckpt::checkpoint {

/// A record that torch.save wrote, inside a data file without our index: a range of the file that
/// may be a zip.
///
/// Everything is hostile. The archive's directory is read and checked first; the small entries'
/// CRCs are checked before anything in them is believed; the payload's is for whoever reads it.
struct StockRecord {
  bool is_zip = false;
  std::vector<format::ZipEntry> entries;  ///< offsets from the record's start
  std::optional<format::TensorDescription>
      tensor;                ///< if it is a plain tensor, little-endian, of a dtype we know
  format::ZipEntry payload;  ///< of that tensor
};

/// Checks the header of the record of `length` bytes at `offset`, which lie within the file, and
/// describes it. `name` is the tensor's, for messages. Throws CorruptionError if it is a zip that
/// can't be right.
StockRecord OpenStockRecord(const io::File& file, const std::string& name, int64_t offset,
                            int64_t length);

/// All bytes of such a record, after the CRC of every entry has been checked if it is a zip.
std::vector<std::byte> ReadStockBytes(const io::File& file, const std::string& name, int64_t offset,
                                      int64_t length);

}  // namespace hsdp_ckpt::checkpoint
