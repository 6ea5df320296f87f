#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace hsdp_ckpt::format {

// Every dtype of torch 2.11 to 2.15 by its canonical name, which is what a pickle holds: a global
// of module `torch`.
// clang-format off
#define HSDP_CKPT_DTYPES(X) \
  X(bcomplex32) X(bfloat16) X(bits16) X(bits1x8) X(bits2x4) X(bits4x2) X(bits8) X(bool) \
  X(complex128) X(complex32) X(complex64) X(float16) X(float32) X(float4_e2m1fn_x2) X(float64) \
  X(float8_e4m3fn) X(float8_e4m3fnuz) X(float8_e5m2) X(float8_e5m2fnuz) X(float8_e8m0fnu) \
  X(int1) X(int16) X(int2) X(int3) X(int32) X(int4) X(int5) X(int6) X(int64) X(int7) X(int8) \
  X(qint32) X(qint8) X(quint2x4) X(quint4x2) X(quint8) X(uint1) X(uint16) X(uint2) X(uint3) \
  X(uint32) X(uint4) X(uint5) X(uint6) X(uint64) X(uint7) X(uint8)
// clang-format on
#define HSDP_CKPT_LAYOUTS(X) \
  X(_mkldnn)                 \
  X(jagged) X(sparse_bsc) X(sparse_bsr) X(sparse_coo) X(sparse_csc) X(sparse_csr) X(strided)

#define HSDP_CKPT_ENUMERATOR(name) k_##name,
enum class Dtype : uint8_t { HSDP_CKPT_DTYPES(HSDP_CKPT_ENUMERATOR) };
enum class Layout : uint8_t { HSDP_CKPT_LAYOUTS(HSDP_CKPT_ENUMERATOR) };
#undef HSDP_CKPT_ENUMERATOR

/// The values are those of DCP's `_MEM_FORMAT_ENCODING`.
enum class MemoryFormat : uint8_t { kContiguous = 0, kChannelsLast = 1, kPreserve = 2 };

/// The name without "torch.", such as "float32" or "strided".
std::string_view Name(Dtype dtype);
std::string_view Name(Layout layout);
/// The name of DCP's enum member, such as "TORCH_CONTIGUOUS_FORMAT".
std::string_view Name(MemoryFormat format);

/// The other way round; nothing for a name that torch 2.11 to 2.15 do not have.
std::optional<Dtype> DtypeFromName(std::string_view name);
std::optional<Layout> LayoutFromName(std::string_view name);
std::optional<MemoryFormat> MemoryFormatFromName(std::string_view name);

}  // namespace hsdp_ckpt::format
