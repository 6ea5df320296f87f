#include "pickle/object_check.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "format/record_dtype.h"
#include "format/tensor_pickle.h"
#include "pickle/opcodes.h"
#include "pickle/tokenizer.h"
#include "pickle_bytes.h"

namespace hsdp_ckpt {
namespace {

using pickle::Op;
using testing::HasSubstr;
using namespace pickle_bytes;

constexpr uint64_t kNoLimit = pickle::kHugeObject;

const pickle::TorchNames kNames{
    {}, {}, {"torch.Tensor", "torch.FloatStorage"}, {{"FloatStorage", 4}}};

size_t Check(std::string_view pickle, uint64_t limit = kNoLimit,
             const pickle::EntrySizes* entries = nullptr) {
  pickle::ObjectCosts costs(kNames, "object", limit, entries);
  return pickle::CheckPickle(base::AsBytes(pickle), costs);
}

std::string ErrorOf(const std::string& opcodes, uint64_t limit = kNoLimit) {
  try {
    Check(opcodes + Code(Op::kStop), limit);
  } catch (const base::CorruptionError& error) {
    return error.what();
  }
  return "no error";
}

std::string Codes(Op op, size_t count) { return std::string(count, static_cast<char>(op)); }

// A dict with every opcode that torch's own unpickler takes for values.
std::string PlainValues() {
  const std::string numbers = Int(-1) + "K\x07" + "M\x01\x02" + "\x8a\x02\xff\x7f" +
                              Code(Op::kBinFloat) + std::string(8, '\0');
  const std::string list =
      Code(Op::kEmptyList) + "(" + numbers + Code(Op::kAppends) + "N" + Code(Op::kAppend);
  const std::string tuples = ")" + Code(Op::kTuple1) + "N" + Code(Op::kTuple2) +
                             Code(Op::kNewTrue) + Code(Op::kNewFalse) + Code(Op::kTuple3) +
                             Tuple(Int(1) + Code(Op::kEmptySet)) + Code(Op::kTuple2);
  const std::string far = LittleEndian(300, 4);
  const std::string remembered =
      Text("text") + Code(Op::kLongBinPut) + far + Code(Op::kLongBinGet) + far;
  return "\x80\x02" + Code(Op::kEmptyDict) + Put(0) + "(" + Text("list") + list + "U\x02tu" +
         tuples + Get(0) + "N" + remembered + Code(Op::kSetItems) + "NN" + Code(Op::kSetItem);
}

TEST(ObjectCheckTest, PlainValuesCostNothingAndEndAtStop) {
  const std::string pickle = PlainValues() + Code(Op::kStop);
  EXPECT_EQ(Check(pickle, 0), pickle.size());
  EXPECT_EQ(Check(pickle + "what follows", 0), pickle.size());
}

TEST(ObjectCheckTest, TruncationAtEachByteIsNoticed) {
  const auto tensor = format::EncodeTensorPickle(
      format::ContiguousTensor(*format::FindRecordDtype("float32"), std::vector<int64_t>{2, 3}));
  const pickle::EntrySizes entries{{"data/0", 24}};
  for (const std::string& pickle :
       {std::string(base::AsText(tensor)), PlainValues() + Code(Op::kStop)}) {
    EXPECT_EQ(Check(pickle, kNoLimit, &entries), pickle.size());
    for (size_t size = 0; size < pickle.size(); ++size) {
      const std::vector<char> cut(pickle.begin(), pickle.begin() + static_cast<ptrdiff_t>(size));
      EXPECT_THROW(Check({cut.data(), cut.size()}, kNoLimit, &entries), base::CorruptionError)
          << size;
    }
  }
}

TEST(ObjectCheckTest, OpcodesThatTorchRefusesAreNamed) {
  const std::string argument = LittleEndian(0, 8) + "\n\n";
  for (const Op op : {Op::kPop,
                      Op::kPopMark,
                      Op::kDup,
                      Op::kFloat,
                      Op::kInt,
                      Op::kLong,
                      Op::kPersId,
                      Op::kString,
                      Op::kBinString,
                      Op::kUnicode,
                      Op::kDict,
                      Op::kGet,
                      Op::kInst,
                      Op::kList,
                      Op::kObj,
                      Op::kPut,
                      Op::kExt1,
                      Op::kExt2,
                      Op::kExt4,
                      Op::kLong4,
                      Op::kBinBytes,
                      Op::kShortBinBytes,
                      Op::kShortBinUnicode,
                      Op::kBinUnicode8,
                      Op::kBinBytes8,
                      Op::kAddItems,
                      Op::kFrozenSet,
                      Op::kNewObjEx,
                      Op::kStackGlobal,
                      Op::kMemoize,
                      Op::kFrame,
                      Op::kByteArray8,
                      Op::kNextBuffer,
                      Op::kReadonlyBuffer}) {
    const std::string expected = "opcode " + std::string(pickle::OpcodeName(op));
    try {
      Check(Code(op) + argument);
      ADD_FAILURE() << expected;
    } catch (const base::CorruptionError& error) {
      ADD_FAILURE() << error.what();  // it is no damage
    } catch (const base::Error& error) {
      EXPECT_EQ(error.what(), expected);
    }
  }
}

TEST(ObjectCheckTest, StackAndMemoAreFenced) {
  const std::string none = "expected a value on the stack, got none";
  EXPECT_THAT(ErrorOf(Code(Op::kTuple1)), HasSubstr("object: pickle at byte 0: " + none));
  EXPECT_THAT(ErrorOf("N" + Code(Op::kTuple2)), HasSubstr(none));
  EXPECT_THAT(ErrorOf("NN" + Code(Op::kTuple3)), HasSubstr(none));
  EXPECT_THAT(ErrorOf(Put(0)), HasSubstr(none));
  EXPECT_THAT(ErrorOf(Code(Op::kReduce)), HasSubstr(none));
  EXPECT_THAT(ErrorOf("N" + Code(Op::kNewObj)), HasSubstr(none));
  EXPECT_THAT(ErrorOf(Code(Op::kBinPersId)), HasSubstr(none));
  EXPECT_THAT(ErrorOf("N" + Code(Op::kBuild)), HasSubstr(none));
  EXPECT_THAT(ErrorOf("N" + Code(Op::kAppend)), HasSubstr(none));
  EXPECT_THAT(ErrorOf("NN" + Code(Op::kSetItem)), HasSubstr(none));
  EXPECT_THAT(ErrorOf("(N" + Code(Op::kAppends)), HasSubstr(none));
  // What lies below the last mark is out of reach.
  EXPECT_THAT(ErrorOf("NN(N" + Code(Op::kTuple2)), HasSubstr(none));
  EXPECT_THAT(ErrorOf("N(" + Code(Op::kTuple1)), HasSubstr(none));
  const std::string no_mark = "expected a mark on the stack, got none";
  for (const Op op : {Op::kTuple, Op::kAppends, Op::kSetItems})
    EXPECT_THAT(ErrorOf("N" + Code(op)), HasSubstr(no_mark));
  EXPECT_THAT(ErrorOf("N" + Put(6) + Get(7)),
              HasSubstr("pickle at byte 3: expected a memo entry, got none of index 7"));
}

TEST(ObjectCheckTest, TextMustBeUtf8) {
  EXPECT_EQ(ErrorOf(Text("\xed\xa0\x80\xf4\x8f\xbf\xbf")), "no error");  // a lone surrogate, too
  for (const std::string text : {"\xff", "\xc0\x80", "\xe2\x82", "\xf4\x90\x80\x80"})
    EXPECT_THAT(ErrorOf(Text(text)), HasSubstr("expected a str in UTF-8, got other bytes"));
  EXPECT_EQ(ErrorOf("U\x01\xff"), "no error");  // Python 2's str is bytes
}

// Values nested as deep as the pickle is long, which nothing may follow by recursion.
TEST(ObjectCheckTest, DepthTakesNoStack) {
  constexpr size_t kDepth = 1 << 20;
  const std::string deep = Code(Op::kEmptyTuple) + Codes(Op::kTuple1, kDepth);
  EXPECT_EQ(ErrorOf(deep, 0), "no error");
  EXPECT_EQ(ErrorOf(deep + Put(0) + Codes(Op::kTuple1, kDepth) + Get(0), 0), "no error");
}

TEST(ObjectCheckTest, SharedTuplesDoNotUnfold) {
  std::string doubled = Code(Op::kEmptyTuple) + Put(0);
  for (int i = 0; i < 200; ++i) doubled += Get(0) + Get(0) + Code(Op::kTuple2) + Put(0);
  EXPECT_EQ(ErrorOf(doubled, 0), "no error");
}

TEST(ObjectCheckTest, AListGrowsWhereverItIsNamed) {
  // set(list), of a list that gets its items after it was put into the memo.
  const std::string set_of_list = Call(Global("builtins", "set"), Tuple(Get(0)));
  const std::string filled =
      Code(Op::kEmptyList) + Put(0) + "(" + std::string(50, 'N') + Code(Op::kAppends);
  EXPECT_EQ(ErrorOf(filled + set_of_list, 51), "no error");
  EXPECT_EQ(ErrorOf(filled + set_of_list, 50), "object: its pickle makes more than its own size");
  EXPECT_EQ(ErrorOf(filled + set_of_list + set_of_list, 101),
            "object: its pickle makes more than its own size");
}

TEST(ObjectCheckTest, NumbersOfAnySizeAreKept) {
  // What a storage's size says decides, so a number is seen as it is or as more than all.
  const auto storage = [](const std::string& elements) {
    const std::string kind = Global("torch", "FloatStorage");
    return Tuple(Text("storage") + kind + Text("0") + Text("cpu") + elements) +
           Code(Op::kBinPersId);
  };
  const auto long1 = [](const std::string& bytes) {
    return Code(Op::kLong1) + LittleEndian(bytes.size(), 1) + bytes;
  };
  const std::string no_size = "object: its pickle makes storage 0 of a size that none has";
  EXPECT_EQ(ErrorOf(storage(Int(10)), 40), "no error");
  EXPECT_EQ(ErrorOf(storage(Int(11)), 40), "object: its pickle makes more than its own size");
  EXPECT_EQ(ErrorOf(storage(Int(-1)), 40), no_size);
  EXPECT_EQ(ErrorOf(storage(long1("\x0a")), 40), "no error");
  EXPECT_EQ(ErrorOf(storage(long1("\x0a" + std::string(200, '\0'))), 40), "no error");
  EXPECT_EQ(ErrorOf(storage(long1(std::string(8, '\0') + "\x01")), 40), no_size);
  EXPECT_EQ(ErrorOf(storage(long1(std::string(250, '\xff'))), 40), no_size);
  EXPECT_EQ(ErrorOf(storage(long1(std::string(7, '\0') + "\x80" + std::string(1, '\0'))), 40),
            no_size);
}

TEST(ObjectCheckTest, BuildCopiesAStateAndSetsNoTensor) {
  const std::string instance = Call(Global("collections", "OrderedDict"), ")");
  const std::string state =
      Code(Op::kEmptyDict) + "(" + Text("a") + "N" + Text("b") + "N" + Code(Op::kSetItems);
  EXPECT_EQ(ErrorOf(instance + state + "b", 5), "no error");
  EXPECT_EQ(ErrorOf(instance + state + "b", 4), "object: its pickle makes more than its own size");
  const std::string storage =
      Tuple(Text("storage") + Global("torch", "FloatStorage") + Text("0") + Text("cpu") + Int(1)) +
      Code(Op::kBinPersId);
  EXPECT_EQ(ErrorOf(storage + state + "b"), "object: its pickle sets a tensor anew");
}

TEST(NamesGlobalTest, FindsAGlobalWhereverItStands) {
  const auto names = [](const std::string& bytes) {
    return pickle::NamesGlobal(base::AsBytes(bytes));
  };
  EXPECT_TRUE(names(Global("builtins", "set")));
  EXPECT_TRUE(names("K\x01" + Global("a.b_1", "C.d")));
  EXPECT_TRUE(names("NNN" + Global("m", "n") + "."));  // no gap before it
  EXPECT_TRUE(names("a line\n" + Global("m", "n")));
  EXPECT_TRUE(names("two\nlines\n" + Global("c", "c")));
  EXPECT_FALSE(names(""));
  EXPECT_FALSE(names("\n\n\n"));
  EXPECT_FALSE(names("cmodule\nname"));     // no end of the second line
  EXPECT_FALSE(names("cmodule\n\n"));       // no attribute
  EXPECT_FALSE(names("c\nname\n"));         // no module
  EXPECT_FALSE(names("module\nname\n"));    // no opcode
  EXPECT_FALSE(names("cmod ule\nname\n"));  // no word
  EXPECT_FALSE(names("cmodule\nna me\n"));
}

}  // namespace
}  // namespace hsdp_ckpt
