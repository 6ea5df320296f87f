#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace hsdp_ckpt::format {

/// One of the dtypes that records can have, as torch.save writes it. A `.metadata` may name more:
/// its Dtype (format/types.h) is every dtype of torch. `storage` is the class that stands in the
/// record's pickle: dtypes that had a typed storage in torch 1.x ("FloatStorage") keep it, newer
/// ones (empty) are an UntypedStorage and their own name.
struct RecordDtype {
  uint8_t code;              ///< in our index; never reused
  std::string_view name;     ///< as in torch.float32
  uint8_t size;              ///< bytes of an element
  std::string_view storage;  ///< class name in module torch, or empty
};

/// All dtypes that stock DCP saves and loads.
std::span<const RecordDtype> RecordDtypes();
/// Null if there is none of that name, code or storage class.
const RecordDtype* FindRecordDtype(std::string_view name);
const RecordDtype* FindRecordDtype(uint8_t code);
const RecordDtype* FindRecordDtypeOfStorage(std::string_view storage);

}  // namespace hsdp_ckpt::format
