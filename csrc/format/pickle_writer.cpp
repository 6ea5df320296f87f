#include "format/pickle_writer.h"

#include <bit>
#include <iterator>
#include <utility>

#include "base/error.h"

namespace hsdp_ckpt::format {
namespace {

using pickle::Op;
constexpr size_t kFrameSize = 8;            // bytes of a frame's length
constexpr size_t kHeader = 3 + kFrameSize;  // bytes before what the frame holds

}  // namespace

size_t PickleWriter::ShapeHash::operator()(const Shape& shape) const {
  uint64_t hash = shape.size();
  for (const int64_t number : shape)
    hash = std::rotl(hash ^ static_cast<uint64_t>(number), 23) * 0x9E3779B97F4A7C15u;
  return hash;
}

PickleWriter::PickleWriter(size_t expected) {
  out_.reserve(expected);
  Put(Op::kProto);
  Number(4, 1);
  Put(Op::kFrame);
  Number(0, kFrameSize);  // yet to come
}

std::string PickleWriter::Finish() {
  Put(Op::kStop);
  // One frame around everything, so that an unpickler reads the file in one go.
  const size_t size = out_.size() - kHeader;
  for (size_t i = 0; i < kFrameSize; ++i)
    out_[kHeader - kFrameSize + i] = static_cast<char>(size >> (8 * i));
  return std::move(out_);
}

void PickleWriter::Number(uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) out_.push_back(static_cast<char>(value >> (8 * i)));
}

bool PickleWriter::Recall(MemoSlot slot) {
  if (slot == kUnsetSlot) return false;
  Put(slot < 256 ? Op::kBinGet : Op::kLongBinGet);
  Number(slot, slot < 256 ? 1 : 4);
  return true;
}

// ---- numbers

void PickleWriter::Int(int64_t value) {
  if (value >= 0 && value < 256) {
    Put(Op::kBinInt1);
    Number(static_cast<uint64_t>(value), 1);
  } else if (value >= 0 && value < 65536) {
    Put(Op::kBinInt2);
    Number(static_cast<uint64_t>(value), 2);
  } else if (value >= INT32_MIN && value <= INT32_MAX) {
    Put(Op::kBinInt);
    Number(static_cast<uint64_t>(value), 4);
  } else {
    Put(Op::kLong1);
    Number(8, 1);
    Number(static_cast<uint64_t>(value), 8);
  }
}

void PickleWriter::BigInt(std::string_view two_complement) {
  const size_t size = two_complement.size();
  if (size > INT32_MAX)
    throw base::Error("planner data: an integer of " + std::to_string(size) + " bytes");
  Put(size < 256 ? Op::kLong1 : Op::kLong4);
  Number(size, size < 256 ? 1 : 4);
  out_.append(two_complement);
}

void PickleWriter::Float(double value) {
  Put(Op::kBinFloat);
  const auto bits = std::bit_cast<uint64_t>(value);
  for (int shift = 56; shift >= 0; shift -= 8) out_.push_back(static_cast<char>(bits >> shift));
}

// ---- texts

void PickleWriter::Counted(std::string_view text, Op one_byte, Op four_bytes, Op eight_bytes) {
  if (text.size() < 256) {
    Put(one_byte);
    Number(text.size(), 1);
  } else if (text.size() <= UINT32_MAX) {
    Put(four_bytes);
    Number(text.size(), 4);
  } else {
    Put(eight_bytes);
    Number(text.size(), 8);
  }
  out_.append(text);
}

void PickleWriter::Bytes(std::string_view bytes) {
  Counted(bytes, Op::kShortBinBytes, Op::kBinBytes, Op::kBinBytes8);
}

void PickleWriter::NewStr(std::string_view text) {
  Counted(text, Op::kShortBinUnicode, Op::kBinUnicode, Op::kBinUnicode8);
}

void PickleWriter::Str(std::string_view text) {
  if (text.size() > UINT32_MAX)
    throw base::Error("metadata: a text of " + std::to_string(text.size()) + " bytes");
  MemoSlot& slot = strings_[text];
  if (Recall(slot)) return;
  NewStr(text);
  Memoize(slot);
}

void PickleWriter::OptionalStr(const std::optional<std::string>& text) {
  if (text) {
    Str(*text);
  } else {
    Put(Op::kNone);
  }
}

void PickleWriter::StrList(const std::vector<std::string>& strings) {
  Put(Op::kEmptyList);
  Put(Op::kMark);
  for (const std::string& string : strings) Str(string);
  Put(Op::kAppends);
}

// ---- shapes

void PickleWriter::Tuple(const Shape& numbers) {
  constexpr Op kShort[] = {Op::kEmptyTuple, Op::kTuple1, Op::kTuple2, Op::kTuple3};
  const bool is_short = numbers.size() < std::size(kShort);
  if (!is_short) Put(Op::kMark);
  for (const int64_t number : numbers) Int(number);
  Put(is_short ? kShort[numbers.size()] : Op::kTuple);
}

void PickleWriter::Size(const Shape& shape) {
  MemoSlot& slot = shapes_.try_emplace(shape, kUnsetSlot).first->second;
  if (Recall(slot)) return;
  Global(size_class_, "torch", "Size");
  Tuple(shape);
  Put(Op::kTuple1);
  Put(Op::kReduce);
  Memoize(slot);
}

// ---- globals and instances

void PickleWriter::Global(std::string_view module, std::string_view name) {
  Str(module);
  Str(name);
  Put(Op::kStackGlobal);
}

void PickleWriter::Global(MemoSlot& slot, std::string_view module, std::string_view name) {
  if (Recall(slot)) return;
  Global(module, name);
  Memoize(slot);
}

void PickleWriter::New(MemoSlot& cls, std::string_view module, std::string_view name) {
  Global(cls, module, name);
  Put(Op::kEmptyTuple);
  Put(Op::kNewObj);
}

void PickleWriter::BeginInstance(MemoSlot& cls, std::string_view module, std::string_view name) {
  New(cls, module, name);
  Put(Op::kEmptyDict);
  Put(Op::kMark);
}

void PickleWriter::EndInstance() {
  Put(Op::kSetItems);
  Put(Op::kBuild);
}

}  // namespace hsdp_ckpt::format
