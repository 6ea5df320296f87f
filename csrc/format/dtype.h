#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace hsdp_ckpt::format {

/// One of torch's dtypes as torch.save writes it. `storage` is the class that stands in the
/// record's pickle: dtypes that had a typed storage in torch 1.x ("FloatStorage") keep it, newer
/// ones (empty) are an UntypedStorage and their own name.
struct DType {
  uint8_t code;              ///< in our index; never reused
  std::string_view name;     ///< as in torch.float32
  uint8_t size;              ///< bytes of an element
  std::string_view storage;  ///< class name in module torch, or empty
};

/// All dtypes that stock DCP saves and loads.
std::span<const DType> DTypes();
/// Null if there is none of that name, code or storage class.
const DType* FindDType(std::string_view name);
const DType* FindDType(uint8_t code);
const DType* FindDTypeOfStorage(std::string_view storage);

}  // namespace hsdp_ckpt::format
