#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/bytes.h"
#include "pickle/opcodes.h"
#include "pickle/pickle_strings.h"

// Pickles put together opcode by opcode, for tests of what reads them.
namespace hsdp_ckpt::pickle_bytes {

inline std::string LittleEndian(uint64_t value, int bytes) {
  std::string out;
  for (int i = 0; i < bytes; ++i) out.push_back(static_cast<char>(value >> (8 * i)));
  return out;
}

inline std::string Code(pickle::Op op) { return {static_cast<char>(op)}; }

inline std::string Int(int32_t value) {
  return Code(pickle::Op::kBinInt) + LittleEndian(static_cast<uint32_t>(value), 4);
}

inline std::string Text(std::string_view text) {
  return Code(pickle::Op::kBinUnicode) + LittleEndian(text.size(), 4) + std::string(text);
}

inline std::string Global(std::string_view module, std::string_view attribute) {
  return Code(pickle::Op::kGlobal) + std::string(module) + "\n" + std::string(attribute) + "\n";
}

/// `items` are the pickles of the tuple's items, one after the other.
inline std::string Tuple(std::string_view items) {
  return Code(pickle::Op::kMark) + std::string(items) + Code(pickle::Op::kTuple);
}

/// The function and its arguments, a tuple, are pickles.
inline std::string Call(std::string_view function, std::string_view arguments) {
  return std::string(function) + std::string(arguments) + Code(pickle::Op::kReduce);
}

inline std::string Put(uint8_t index) { return Code(pickle::Op::kBinPut) + LittleEndian(index, 1); }

inline std::string Get(uint8_t index) { return Code(pickle::Op::kBinGet) + LittleEndian(index, 1); }

/// A metadata file as far as a commit looks into it: a pickle with these texts.
inline std::string Texts(const std::vector<std::string>& texts) {
  std::string items;
  for (const std::string& text : texts) items += Text(text);
  return Code(pickle::Op::kProto) + "\x02" + Tuple(items) + Code(pickle::Op::kStop);
}

inline std::vector<std::string> TextsIn(std::string_view pickle) {
  std::vector<std::string> texts;
  pickle::ForEachString(base::AsBytes(pickle), "texts",
                        [&](std::string_view text) { texts.emplace_back(text); });
  return texts;
}

}  // namespace hsdp_ckpt::pickle_bytes
