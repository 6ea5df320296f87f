#include "format/dtype.h"

#include <algorithm>
#include <array>

namespace hsdp_ckpt::format {
namespace {

constexpr std::array kDTypes{
    DType{1, "float32", 4, "FloatStorage"},
    DType{2, "float64", 8, "DoubleStorage"},
    DType{3, "float16", 2, "HalfStorage"},
    DType{4, "bfloat16", 2, "BFloat16Storage"},
    DType{5, "uint8", 1, "ByteStorage"},
    DType{6, "int8", 1, "CharStorage"},
    DType{7, "int16", 2, "ShortStorage"},
    DType{8, "int32", 4, "IntStorage"},
    DType{9, "int64", 8, "LongStorage"},
    DType{10, "bool", 1, "BoolStorage"},
    DType{11, "complex64", 8, "ComplexFloatStorage"},
    DType{12, "complex128", 16, "ComplexDoubleStorage"},
    DType{13, "complex32", 4, ""},
    DType{14, "uint16", 2, ""},
    DType{15, "uint32", 4, ""},
    DType{16, "uint64", 8, ""},
    DType{17, "float8_e4m3fn", 1, ""},
    DType{18, "float8_e5m2", 1, ""},
    DType{19, "float8_e4m3fnuz", 1, ""},
    DType{20, "float8_e5m2fnuz", 1, ""},
    DType{21, "float8_e8m0fnu", 1, ""},
    DType{22, "float4_e2m1fn_x2", 1, ""},
    DType{23, "bcomplex32", 4, ""},
};

template <typename Match>
const DType* Find(const Match& match) {
  const auto found = std::find_if(kDTypes.begin(), kDTypes.end(), match);
  return found == kDTypes.end() ? nullptr : &*found;
}

}  // namespace

std::span<const DType> DTypes() { return kDTypes; }

const DType* FindDType(std::string_view name) {
  return Find([&](const DType& dtype) { return dtype.name == name; });
}

const DType* FindDType(uint8_t code) {
  return Find([&](const DType& dtype) { return dtype.code == code; });
}

const DType* FindDTypeOfStorage(std::string_view storage) {
  return Find([&](const DType& dtype) { return !storage.empty() && dtype.storage == storage; });
}

}  // namespace hsdp_ckpt::format
