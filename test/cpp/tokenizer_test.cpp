#include "pickle/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>
#include <vector>

#include "base/bytes.h"
#include "error_of.h"
#include "pickle_bytes.h"

namespace hsdp_ckpt {
namespace {

using pickle::Op;
using pickle::Opcodes;
using pickle_bytes::Code;
using pickle_bytes::LittleEndian;
using testing::HasSubstr;

pickle::Tokenizer Tokens(std::string_view pickle, Opcodes opcodes = Opcodes::kAll) {
  return {base::AsBytes(pickle), "file", opcodes};
}

/// An opcode with an argument, and what the tokenizer makes of it.
struct Sample {
  Op op;
  std::string argument{};
  uint64_t number = 0;
  std::string text{};
  std::string second_line{};

  std::string Bytes() const { return Code(op) + argument; }
};

std::vector<Sample> FixedSamples() {
  std::vector<Sample> samples;
  const auto add = [&](int bytes, std::initializer_list<Op> ops) {
    const uint64_t number = 0xF1E2D3C4B5A69788u >> (8 * (8 - bytes));
    for (const Op op : ops) samples.push_back({op, LittleEndian(number, bytes), number});
  };
  add(1, {Op::kBinInt1, Op::kBinGet, Op::kBinPut, Op::kProto, Op::kExt1});
  add(2, {Op::kBinInt2, Op::kExt2});
  add(4, {Op::kBinInt, Op::kLongBinGet, Op::kLongBinPut, Op::kExt4});
  add(8, {Op::kBinFloat, Op::kFrame});
  return samples;
}

std::vector<Sample> CountedSamples() {
  std::vector<Sample> samples;
  const auto add = [&](int bytes, std::initializer_list<Op> ops) {
    // A text may hold every byte, ends of lines and of pickles among them.
    const std::string text("a\n.\0\xff", 5);
    for (const Op op : ops) {
      samples.push_back({op, LittleEndian(text.size(), bytes) + text, 0, text});
      samples.push_back({op, LittleEndian(0, bytes)});
    }
  };
  add(1, {Op::kShortBinString, Op::kShortBinBytes, Op::kShortBinUnicode, Op::kLong1});
  add(4, {Op::kBinString, Op::kBinBytes, Op::kBinUnicode, Op::kLong4});
  add(8, {Op::kBinBytes8, Op::kBinUnicode8, Op::kByteArray8});
  return samples;
}

std::vector<Sample> LineSamples() {
  std::vector<Sample> samples;
  for (const Op op : {Op::kFloat, Op::kInt, Op::kLong, Op::kString, Op::kUnicode, Op::kPersId,
                      Op::kGet, Op::kPut}) {
    samples.push_back({op, "12 .\r\n", 0, "12 .\r"});
    samples.push_back({op, "\n"});
  }
  for (const Op op : {Op::kGlobal, Op::kInst}) {
    samples.push_back({op, "a.module\nName\n", 0, "a.module", "Name"});
    samples.push_back({op, "\n\n"});
  }
  return samples;
}

std::vector<Sample> PlainSamples() {
  std::vector<Sample> samples;
  for (const Op op :
       {Op::kMark,        Op::kStop,      Op::kPop,        Op::kPopMark,       Op::kDup,
        Op::kNone,        Op::kBinPersId, Op::kReduce,     Op::kAppend,        Op::kBuild,
        Op::kDict,        Op::kAppends,   Op::kList,       Op::kObj,           Op::kSetItem,
        Op::kTuple,       Op::kSetItems,  Op::kEmptyTuple, Op::kEmptyList,     Op::kEmptyDict,
        Op::kNewObj,      Op::kTuple1,    Op::kTuple2,     Op::kTuple3,        Op::kNewTrue,
        Op::kNewFalse,    Op::kEmptySet,  Op::kAddItems,   Op::kFrozenSet,     Op::kNewObjEx,
        Op::kStackGlobal, Op::kMemoize,   Op::kNextBuffer, Op::kReadonlyBuffer}) {
    samples.push_back({op});
  }
  return samples;
}

std::vector<Sample> AllSamples() {
  std::vector<Sample> samples;
  for (const auto& some : {FixedSamples(), CountedSamples(), LineSamples(), PlainSamples()})
    samples.insert(samples.end(), some.begin(), some.end());
  return samples;
}

TEST(TokenizerTest, TakesEveryOpcodeApart) {
  std::set<uint8_t> seen;
  for (const Sample& sample : AllSamples()) {
    const std::string bytes = sample.Bytes() + Code(Op::kStop);
    pickle::Tokenizer tokens = Tokens(bytes);
    const pickle::Token token = tokens.Next();
    const std::string name(pickle::OpcodeName(sample.op));
    EXPECT_EQ(token.op, sample.op) << name;
    EXPECT_EQ(token.position, 0u) << name;
    EXPECT_EQ(token.number, sample.number) << name;
    EXPECT_EQ(token.text, sample.text) << name;
    EXPECT_EQ(token.second_line, sample.second_line) << name;
    EXPECT_EQ(tokens.remaining(), 1u) << name;
    seen.insert(static_cast<uint8_t>(sample.op));
  }
  for (int byte = 0; byte < 256; ++byte) {
    const std::string_view name = pickle::OpcodeName(static_cast<Op>(byte));
    EXPECT_EQ(seen.contains(static_cast<uint8_t>(byte)), !name.empty()) << byte;
  }
}

TEST(TokenizerTest, OneOpcodeFollowsTheOther) {
  std::string pickle;
  std::vector<size_t> positions;
  const std::vector<Sample> samples = AllSamples();
  for (const Sample& sample : samples) {
    positions.push_back(pickle.size());
    pickle += sample.Bytes();
  }
  pickle::Tokenizer tokens = Tokens(pickle);
  for (size_t i = 0; i < samples.size(); ++i) {
    const pickle::Token token = tokens.Next();
    EXPECT_EQ(token.op, samples[i].op);
    EXPECT_EQ(token.position, positions[i]);
    EXPECT_EQ(tokens.Place(), "pickle at byte " + std::to_string(positions[i]));
  }
  EXPECT_EQ(tokens.remaining(), 0u);
  EXPECT_EQ(
      ErrorOf([&] { tokens.Next(); }),
      "file: pickle at byte " + std::to_string(pickle.size()) + ": expected 1 more bytes, got 0");
}

TEST(TokenizerTest, TruncationAtEachByteIsNoticed) {
  for (const Sample& sample : AllSamples()) {
    const std::string bytes = sample.Bytes();
    for (size_t size = 0; size < bytes.size(); ++size) {
      // Of memory of its own, so that a sanitizer sees a read beyond the end.
      const std::vector<char> cut(bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(size));
      const std::string error =
          ErrorOf([&] { Tokens(std::string_view(cut.data(), cut.size())).Next(); });
      EXPECT_THAT(error, HasSubstr("file: pickle at byte 0: expected "))
          << pickle::OpcodeName(sample.op) << " cut to " << size;
    }
  }
}

TEST(TokenizerTest, ErrorsSayWhatIsMissing) {
  const auto error_of = [](const std::string& pickle) {
    return ErrorOf([&] { Tokens(pickle).Next(); });
  };
  EXPECT_EQ(error_of(Code(Op::kBinInt) + "abc"),
            "file: pickle at byte 0: expected 4 more bytes, got 3");
  EXPECT_EQ(error_of(Code(Op::kShortBinBytes) + "\x05" + "abc"),
            "file: pickle at byte 0: expected 5 more bytes, got 3");
  // Larger than any sum with a position could be.
  EXPECT_EQ(error_of(Code(Op::kBinUnicode8) + std::string(8, '\xff') + "abc"),
            "file: pickle at byte 0: expected 18446744073709551615 more bytes, got 3");
  EXPECT_EQ(error_of(Code(Op::kGlobal) + "module\nname"),
            "file: pickle at byte 0: expected a line, got the end of the file");
}

TEST(TokenizerTest, BytesThatAreNoOpcodeAreRefused) {
  int refused = 0;
  for (int byte = 0; byte < 256; ++byte) {
    if (!pickle::OpcodeName(static_cast<Op>(byte)).empty()) continue;
    const std::string pickle = Code(Op::kNone) + Code(static_cast<Op>(byte)) + std::string(16, '0');
    pickle::Tokenizer tokens = Tokens(pickle);
    tokens.Next();
    EXPECT_EQ(ErrorOf([&] { tokens.Next(); }),
              "file: pickle at byte 1: expected an opcode of plain data, got opcode " +
                  std::to_string(byte));
    ++refused;
  }
  EXPECT_EQ(refused, 256 - 68);
}

TEST(TokenizerTest, PlainDataNeedsNoneOfTheOthers) {
  const std::set<Op> not_plain{
      Op::kPersId, Op::kBinPersId,  Op::kString,     Op::kBinString,     Op::kShortBinString,
      Op::kInst,   Op::kObj,        Op::kNewObjEx,   Op::kExt1,          Op::kExt2,
      Op::kExt4,   Op::kByteArray8, Op::kNextBuffer, Op::kReadonlyBuffer};
  for (const Sample& sample : AllSamples()) {
    const std::string bytes = sample.Bytes();
    const std::string error = ErrorOf([&] { Tokens(bytes, Opcodes::kPlainData).Next(); });
    const std::string refusal =
        "file: pickle at byte 0: expected an opcode of plain data, got opcode " +
        std::to_string(static_cast<int>(sample.op));
    EXPECT_EQ(error, not_plain.contains(sample.op) ? refusal : "no error");
  }
}

TEST(TokenizerTest, NamesAreThoseOfPickletools) {
  EXPECT_EQ(pickle::OpcodeName(Op::kBinUnicode), "BINUNICODE");
  EXPECT_EQ(pickle::OpcodeName(Op::kReadonlyBuffer), "READONLY_BUFFER");
  EXPECT_EQ(pickle::OpcodeName(static_cast<Op>(0)), "");
}

TEST(LittleEndianIntegerTest, ExtendsTheSignOfAnyNumberOfBytes) {
  const auto value = [](const std::string& bytes) { return pickle::LittleEndianInteger(bytes); };
  EXPECT_EQ(value(""), 0);
  EXPECT_EQ(value("\x7f"), 127);
  EXPECT_EQ(value("\x80"), -128);
  EXPECT_EQ(value("\xff"), -1);
  EXPECT_EQ(value(std::string("\xff\0", 2)), 255);
  EXPECT_EQ(value(LittleEndian(0x7fffffffffffffff, 8)), INT64_MAX);
  EXPECT_EQ(value(LittleEndian(0x8000000000000000, 8)), INT64_MIN);
  for (int bytes = 1; bytes <= 8; ++bytes) EXPECT_EQ(value(std::string(bytes, '\xff')), -1);
}

}  // namespace
}  // namespace hsdp_ckpt
