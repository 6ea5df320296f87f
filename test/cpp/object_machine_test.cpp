#include "pickle/object_machine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "pickle/opcodes.h"
#include "pickle_bytes.h"

namespace hsdp_ckpt {
namespace {

using pickle::Op;
using testing::HasSubstr;
using namespace pickle_bytes;

/// Values as texts; what is filled is shared, as in Python.
class TextBuilder {
 public:
  using Value = std::shared_ptr<std::string>;

  static Value Made(std::string text) { return std::make_shared<std::string>(std::move(text)); }
  static Value None() { return Made("None"); }
  static Value Bool(bool value) { return Made(value ? "True" : "False"); }
  static Value Int(int64_t value) { return Made(std::to_string(value)); }
  static Value Float(double value) { return Made(std::to_string(value)); }
  static Value LargeInt(std::string_view bytes) { return Made("large" + std::string(bytes)); }
  static Value Text(std::string_view utf8) { return Made("'" + std::string(utf8) + "'"); }
  static Value Bytes(std::string_view bytes) { return Made("b" + std::string(bytes)); }
  static Value ByteArray(std::string_view bytes) { return Made("a" + std::string(bytes)); }
  static Value List() { return Made("list"); }
  static Value Dict() { return Made("dict"); }
  static Value Set() { return Made("set"); }
  Value Tuple(std::span<Value> items) { return Made("(" + Joined(items) + ")"); }
  Value FrozenSet(std::span<Value> items) { return Made("frozen(" + Joined(items) + ")"); }
  static Value Global(std::string_view module, std::string_view attribute) {
    return Made(std::string(module) + "." + std::string(attribute));
  }
  Value DottedGlobal(const Value& module, const Value& attribute) {
    return Made(*module + "." + *attribute);
  }
  static bool IsFunction(const Value& value) { return value->ends_with(".f"); }
  Value Call(const Value& function, const Value& arguments) { return Made(*function + *arguments); }
  Value New(const Value& type, const Value& arguments) { return Made("new " + *type + *arguments); }
  static Value Storage(const Value& id) { return Made("storage" + *id); }
  void Append(Value& list, std::span<Value> items) { *list += "[" + Joined(items) + "]"; }
  void SetItems(Value& dict, std::span<Value> items) { *dict += "{" + Joined(items) + "}"; }
  void AddItems(Value& set, std::span<Value> items) { *set += "<" + Joined(items) + ">"; }
  void SetState(Value& object, const Value& state) { *object += " with " + *state; }

 private:
  static std::string Joined(std::span<Value> items) {
    std::string text;
    for (const Value& item : items) text += (text.empty() ? "" : ", ") + *item;
    return text;
  }
};

std::string Made(const std::string& opcodes) {
  const std::string pickle = opcodes + Code(Op::kStop) + "what follows";
  TextBuilder builder;
  pickle::ObjectMachine<TextBuilder> machine(base::AsBytes(pickle), "object", builder);
  while (machine.Step()) {
  }
  EXPECT_EQ(machine.consumed(), opcodes.size() + 1);
  return *machine.result();
}

std::string ErrorOf(const std::string& opcodes) {
  try {
    return Made(opcodes);
  } catch (const base::CorruptionError& error) {
    return std::string("corrupt: ") + error.what();
  } catch (const base::Error& error) {
    return std::string("refused: ") + error.what();
  }
}

std::string Codes(Op op, size_t count) { return std::string(count, static_cast<char>(op)); }

TEST(ObjectMachine, MakesWhatTheOpcodesSay) {
  const std::string numbers = Int(-1) + "K\x07" + "M\x01\x02" + "\x8a\x02\xff\x7f" +
                              Code(Op::kBinFloat) + "\x3f\xf8" + std::string(6, '\0');
  EXPECT_EQ(Made("\x80\x02(" + numbers + "t"), "(-1, 7, 513, 32767, 1.500000)");
  EXPECT_EQ(Made(Code(Op::kEmptyList) + "(NNeNa"), "list[None, None][None]");
  EXPECT_EQ(Made(Code(Op::kEmptyList) + "(e"), "list");
  EXPECT_EQ(Made(Code(Op::kEmptyDict) + "(" + Text("a") + "NuNNs"), "dict{'a', None}{None, None}");
  EXPECT_EQ(Made(Code(Op::kEmptySet) + "(N\x90"), "set<None>");
  EXPECT_EQ(Made("(NN\x91"), "frozen(None, None)");
  EXPECT_EQ(Made(")\x85N\x86NNN\x87\x86"), "(((()), None), (None, None, None))");
  EXPECT_EQ(Made(Call(Global("m", "f"), Tuple(Int(1)))), "m.f(1)");
  EXPECT_EQ(Made(Global("m", "C") + ")\x81" + Text("s") + "b"), "new m.C() with 's'");
  EXPECT_EQ(Made(Text("m") + Text("C") + "\x93"), "'m'.'C'");
  EXPECT_EQ(Made(Tuple(Int(1)) + "Q"), "storage(1)");
  EXPECT_EQ(Made("U\x02tu" + Put(3) + "0" + Get(3)), "'tu'");
  EXPECT_EQ(Made("N\x94"
                 "0" +
                 Text("x") + "\x94" + Get(0) + Get(1) + "\x86\x86"),
            "('x', (None, 'x'))");
  EXPECT_EQ(Made("N(NN1"), "None");
  EXPECT_EQ(Made("N(0"), "None");
  EXPECT_EQ(Made("\x8a\x09"
                 "12345678\x01"),
            "large12345678\x01");
}

TEST(ObjectMachine, AListGrowsWhereverItIsNamed) {
  EXPECT_EQ(Made(Code(Op::kEmptyList) + Put(0) + "N" + Code(Op::kAppend) + "0" + Get(0)),
            "list[None]");
}

TEST(ObjectMachine, RefusesWhatDoesNotFit) {
  EXPECT_THAT(ErrorOf(""), HasSubstr("corrupt: object: pickle at byte 0: expected a value"));
  EXPECT_THAT(ErrorOf("(N" + Code(Op::kTuple2)), HasSubstr("expected a value on the stack"));
  EXPECT_THAT(ErrorOf("Nt"), HasSubstr("expected a mark"));
  EXPECT_THAT(ErrorOf("N(R"), HasSubstr("expected a value on the stack"));
  EXPECT_THAT(ErrorOf(Get(7)), HasSubstr("expected a memo entry, got none of index 7"));
  EXPECT_THAT(ErrorOf(Code(Op::kEmptyDict) + "(Nu"), HasSubstr("expected keys with values"));
  EXPECT_THAT(ErrorOf("X\x01" + std::string(3, '\0') + "\xff"), HasSubstr("a str in UTF-8"));
  EXPECT_THAT(ErrorOf("U\x01\xff"), HasSubstr("a str in UTF-8"));
  EXPECT_THAT(ErrorOf("X\xff\xff\xff\xff"), HasSubstr("more bytes"));
  EXPECT_EQ(ErrorOf("I1\n"), "refused: opcode INT");
  EXPECT_EQ(ErrorOf("\x82\x01"), "refused: opcode EXT1");
}

TEST(ObjectMachine, KeepsNoFunctionInWhatIsMade) {
  const std::string function = Global("m", "f");
  EXPECT_EQ(Made(Call(function, Tuple(function))), "m.f(m.f)");
  EXPECT_EQ(Made(Call(function, Tuple(function)) + "\x85"), "(m.f(m.f))");
  const std::string memo = function + Put(0) + "0", again = Get(0);
  const std::vector<std::string> kept{
      function,
      Tuple(function),
      memo + again,
      Tuple(Tuple(function)),
      Code(Op::kEmptyList) + memo + again + Code(Op::kAppend),
      Code(Op::kEmptyList) + Tuple(function) + Code(Op::kAppend),
      Code(Op::kEmptyDict) + "N" + function + Code(Op::kSetItem),
      Code(Op::kEmptySet) + "(" + function + "\x90",
      "(" + Tuple(function) + "\x91",
      "N" + function + "b",
  };
  for (const std::string& opcodes : kept)
    EXPECT_THAT(ErrorOf(opcodes), HasSubstr("refused: it holds a function"));
}

TEST(ObjectMachine, BoundsTheDepthOfValues) {
  const size_t most = pickle::kMaxObjectDepth - 1;
  EXPECT_EQ(Made(")" + Codes(Op::kTuple1, most)).size(), 2 * (most + 1));
  EXPECT_THAT(ErrorOf(")" + Codes(Op::kTuple1, most + 1)), HasSubstr("at most 1000 deep"));
  EXPECT_THAT(ErrorOf(Codes(Op::kEmptyList, most + 2) + Codes(Op::kAppend, most + 1)),
              HasSubstr("at most 1000 deep"));
  std::string states;
  for (size_t i = 0; i < most + 1; ++i) states += "N";
  EXPECT_THAT(ErrorOf("N" + states + Codes(Op::kBuild, most + 1)), HasSubstr("at most 1000 deep"));
}

}  // namespace
}  // namespace hsdp_ckpt
