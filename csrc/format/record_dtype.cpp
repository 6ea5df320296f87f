#include "format/record_dtype.h"

#include <algorithm>
#include <array>

namespace hsdp_ckpt::format {
namespace {

constexpr std::array kRecordDtypes{
    RecordDtype{1, "float32", 4, "FloatStorage"},
    RecordDtype{2, "float64", 8, "DoubleStorage"},
    RecordDtype{3, "float16", 2, "HalfStorage"},
    RecordDtype{4, "bfloat16", 2, "BFloat16Storage"},
    RecordDtype{5, "uint8", 1, "ByteStorage"},
    RecordDtype{6, "int8", 1, "CharStorage"},
    RecordDtype{7, "int16", 2, "ShortStorage"},
    RecordDtype{8, "int32", 4, "IntStorage"},
    RecordDtype{9, "int64", 8, "LongStorage"},
    RecordDtype{10, "bool", 1, "BoolStorage"},
    RecordDtype{11, "complex64", 8, "ComplexFloatStorage"},
    RecordDtype{12, "complex128", 16, "ComplexDoubleStorage"},
    RecordDtype{13, "complex32", 4, ""},
    RecordDtype{14, "uint16", 2, ""},
    RecordDtype{15, "uint32", 4, ""},
    RecordDtype{16, "uint64", 8, ""},
    RecordDtype{17, "float8_e4m3fn", 1, ""},
    RecordDtype{18, "float8_e5m2", 1, ""},
    RecordDtype{19, "float8_e4m3fnuz", 1, ""},
    RecordDtype{20, "float8_e5m2fnuz", 1, ""},
    RecordDtype{21, "float8_e8m0fnu", 1, ""},
    RecordDtype{22, "float4_e2m1fn_x2", 1, ""},
    RecordDtype{23, "bcomplex32", 4, ""},
};

template <typename Match>
const RecordDtype* Find(const Match& match) {
  const auto found = std::find_if(kRecordDtypes.begin(), kRecordDtypes.end(), match);
  return found == kRecordDtypes.end() ? nullptr : &*found;
}

}  // namespace

std::span<const RecordDtype> RecordDtypes() { return kRecordDtypes; }

const RecordDtype* FindRecordDtype(std::string_view name) {
  return Find([&](const RecordDtype& dtype) { return dtype.name == name; });
}

const RecordDtype* FindRecordDtype(uint8_t code) {
  return Find([&](const RecordDtype& dtype) { return dtype.code == code; });
}

const RecordDtype* FindRecordDtypeOfStorage(std::string_view storage) {
  return Find(
      [&](const RecordDtype& dtype) { return !storage.empty() && dtype.storage == storage; });
}

}  // namespace hsdp_ckpt::format
