#include "pickle/tokenizer.h"

#include <array>
#include <utility>

#include "base/bytes.h"
#include "base/error.h"

namespace hsdp_ckpt::pickle {
namespace {

enum class Argument : uint8_t {
  kUnknown,  // no opcode
  kNone,
  kFixed,    // a number of `width` bytes
  kCounted,  // a count of `width` bytes, and as many bytes
  kLine,
  kTwoLines,
};

struct ArgumentFormat {
  Argument kind = Argument::kUnknown;
  uint8_t width = 0;
};

constexpr ArgumentFormat kNone{Argument::kNone}, kLine{Argument::kLine},
    kTwoLines{Argument::kTwoLines};
constexpr ArgumentFormat Fixed(uint8_t width) { return {Argument::kFixed, width}; }
constexpr ArgumentFormat Counted(uint8_t width) { return {Argument::kCounted, width}; }

struct Opcode {
  Op op = {};
  std::string_view name = {};
  ArgumentFormat argument = {};
  bool is_plain = true;  // whether Opcodes::kPlainData lets it pass
};

constexpr Opcode kOpcodes[] = {
    {Op::kMark, "MARK", kNone},
    {Op::kStop, "STOP", kNone},
    {Op::kPop, "POP", kNone},
    {Op::kPopMark, "POP_MARK", kNone},
    {Op::kDup, "DUP", kNone},
    {Op::kFloat, "FLOAT", kLine},
    {Op::kBinFloat, "BINFLOAT", Fixed(8)},
    {Op::kInt, "INT", kLine},
    {Op::kBinInt, "BININT", Fixed(4)},
    {Op::kBinInt1, "BININT1", Fixed(1)},
    {Op::kLong, "LONG", kLine},
    {Op::kBinInt2, "BININT2", Fixed(2)},
    {Op::kNone, "NONE", kNone},
    {Op::kPersId, "PERSID", kLine, false},
    {Op::kBinPersId, "BINPERSID", kNone, false},
    {Op::kReduce, "REDUCE", kNone},
    {Op::kString, "STRING", kLine, false},
    {Op::kBinString, "BINSTRING", Counted(4), false},
    {Op::kShortBinString, "SHORT_BINSTRING", Counted(1), false},
    {Op::kUnicode, "UNICODE", kLine},
    {Op::kBinUnicode, "BINUNICODE", Counted(4)},
    {Op::kAppend, "APPEND", kNone},
    {Op::kBuild, "BUILD", kNone},
    {Op::kGlobal, "GLOBAL", kTwoLines},
    {Op::kDict, "DICT", kNone},
    {Op::kAppends, "APPENDS", kNone},
    {Op::kGet, "GET", kLine},
    {Op::kBinGet, "BINGET", Fixed(1)},
    {Op::kInst, "INST", kTwoLines, false},
    {Op::kLongBinGet, "LONG_BINGET", Fixed(4)},
    {Op::kList, "LIST", kNone},
    {Op::kObj, "OBJ", kNone, false},
    {Op::kPut, "PUT", kLine},
    {Op::kBinPut, "BINPUT", Fixed(1)},
    {Op::kLongBinPut, "LONG_BINPUT", Fixed(4)},
    {Op::kSetItem, "SETITEM", kNone},
    {Op::kTuple, "TUPLE", kNone},
    {Op::kSetItems, "SETITEMS", kNone},
    {Op::kEmptyTuple, "EMPTY_TUPLE", kNone},
    {Op::kEmptyList, "EMPTY_LIST", kNone},
    {Op::kEmptyDict, "EMPTY_DICT", kNone},
    {Op::kProto, "PROTO", Fixed(1)},
    {Op::kNewObj, "NEWOBJ", kNone},
    {Op::kExt1, "EXT1", Fixed(1), false},
    {Op::kExt2, "EXT2", Fixed(2), false},
    {Op::kExt4, "EXT4", Fixed(4), false},
    {Op::kTuple1, "TUPLE1", kNone},
    {Op::kTuple2, "TUPLE2", kNone},
    {Op::kTuple3, "TUPLE3", kNone},
    {Op::kNewTrue, "NEWTRUE", kNone},
    {Op::kNewFalse, "NEWFALSE", kNone},
    {Op::kLong1, "LONG1", Counted(1)},
    {Op::kLong4, "LONG4", Counted(4)},
    {Op::kBinBytes, "BINBYTES", Counted(4)},
    {Op::kShortBinBytes, "SHORT_BINBYTES", Counted(1)},
    {Op::kShortBinUnicode, "SHORT_BINUNICODE", Counted(1)},
    {Op::kBinUnicode8, "BINUNICODE8", Counted(8)},
    {Op::kBinBytes8, "BINBYTES8", Counted(8)},
    {Op::kEmptySet, "EMPTY_SET", kNone},
    {Op::kAddItems, "ADDITEMS", kNone},
    {Op::kFrozenSet, "FROZENSET", kNone},
    {Op::kNewObjEx, "NEWOBJ_EX", kNone, false},
    {Op::kStackGlobal, "STACK_GLOBAL", kNone},
    {Op::kMemoize, "MEMOIZE", kNone},
    {Op::kFrame, "FRAME", Fixed(8)},
    {Op::kByteArray8, "BYTEARRAY8", Counted(8), false},
    {Op::kNextBuffer, "NEXT_BUFFER", kNone, false},
    {Op::kReadonlyBuffer, "READONLY_BUFFER", kNone, false},
};

using ArgumentTable = std::array<ArgumentFormat, 256>;  // by the opcode's byte

constexpr ArgumentTable MakeTable(Opcodes opcodes) {
  ArgumentTable table{};
  for (const Opcode& opcode : kOpcodes) {
    if (opcode.is_plain || opcodes == Opcodes::kAll)
      table[static_cast<uint8_t>(opcode.op)] = opcode.argument;
  }
  return table;
}

constexpr ArgumentTable kPlainArguments = MakeTable(Opcodes::kPlainData);
constexpr ArgumentTable kAllArguments = MakeTable(Opcodes::kAll);

}  // namespace

Tokenizer::Tokenizer(std::span<const std::byte> pickle, std::string path, Opcodes opcodes)
    : input_(base::AsText(pickle)), path_(std::move(path)), opcodes_(opcodes) {}

// Apart from Take, which is small enough to be inlined then: it runs for every opcode.
void Tokenizer::FailTooShort(uint64_t count) const {
  Fail(std::to_string(count) + " more bytes", std::to_string(remaining()));
}

inline std::string_view Tokenizer::Take(uint64_t count) {
  if (count > remaining()) FailTooShort(count);
  const std::string_view taken(input_.data() + at_, count);
  at_ += count;
  return taken;
}

inline uint64_t Tokenizer::TakeNumber(size_t bytes) {
  const std::string_view taken = Take(bytes);
  if (bytes == 1) return static_cast<uint8_t>(taken[0]);  // most are
  uint64_t value = 0;
  for (size_t i = 0; i < bytes; ++i) {
    const auto byte = static_cast<uint8_t>(taken[i]);
    value |= static_cast<uint64_t>(byte) << (8 * i);
  }
  return value;
}

Token Tokenizer::Next() {
  op_at_ = at_;
  const auto code = static_cast<uint8_t>(Take(1)[0]);
  Token token{static_cast<Op>(code), op_at_, 0, {}, {}};
  const ArgumentTable& table = opcodes_ == Opcodes::kAll ? kAllArguments : kPlainArguments;
  const ArgumentFormat argument = table[code];
  switch (argument.kind) {
    case Argument::kUnknown:
      Fail("an opcode of plain data", "opcode " + std::to_string(code));
    case Argument::kNone:
      break;
    case Argument::kFixed:
      token.number = TakeNumber(argument.width);
      break;
    case Argument::kCounted:
      token.text = Take(TakeNumber(argument.width));
      break;
    case Argument::kLine:
      token.text = TakeLine();
      break;
    case Argument::kTwoLines:
      token.text = TakeLine();
      token.second_line = TakeLine();
      break;
  }
  return token;
}

void Tokenizer::Fail(std::string_view expected, std::string_view got) const {
  throw base::CorruptionError(path_, Place(), std::string(expected), std::string(got));
}

std::string Tokenizer::Place() const { return "pickle at byte " + std::to_string(op_at_); }

std::string_view Tokenizer::TakeLine() {
  const size_t end = input_.find('\n', at_);
  if (end == std::string_view::npos) Fail("a line", "the end of the file");
  const std::string_view line = input_.substr(at_, end - at_);
  at_ = end + 1;
  return line;
}

std::string_view OpcodeName(Op op) {
  for (const Opcode& opcode : kOpcodes) {
    if (opcode.op == op) return opcode.name;
  }
  return {};
}

int64_t LittleEndianInteger(std::string_view two_complement) {
  const size_t size = two_complement.size();
  if (size == 0) return 0;
  uint64_t value = 0;
  for (size_t i = 0; i < size; ++i) {
    const auto byte = static_cast<uint8_t>(two_complement[i]);
    value |= static_cast<uint64_t>(byte) << (8 * i);
  }
  // The sign is extended by a shift up and an arithmetic one down again.
  const size_t unused = 64 - 8 * size;
  return static_cast<int64_t>(value << unused) >> unused;
}

}  // namespace hsdp_ckpt::pickle
