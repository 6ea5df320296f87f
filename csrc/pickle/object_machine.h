#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "pickle/text.h"
#include "pickle/tokenizer.h"

namespace hsdp_ckpt::pickle {

/// How deep a pickle's values may lie in each other. Python's own pickler gives up near here.
inline constexpr uint32_t kMaxObjectDepth = 1000;

/// Runs the opcodes that `torch.save` writes (protocols 2 to 5, of plain data, instances, calls and
/// storages) from hostile bytes, on values that `Builder` makes. The machine calls nothing that the
/// pickle names: whatever a name, a call or a state means is the builder's to say. What it checks
/// is that the opcodes fit each other, and that values do not lie deeper in each other than
/// kMaxObjectDepth; one that is filled after something else holds it counts as it was then. A
/// function is there to be called: it may lie in a tuple of arguments, and nowhere else, so that
/// none is left in what is made.
///
/// Builder has a copyable type `Value`, and:
///   Value None(), Bool(bool), Int(int64_t), LargeInt(two's complement), Float(double),
///         Text(UTF-8), Bytes(view), ByteArray(view), Tuple(span), List(), Dict(), Set(),
///         FrozenSet(span);
///   Value Global(module, attribute), DottedGlobal(module value, attribute value);
///   bool IsFunction(value): of what Global, DottedGlobal, Call and New gave;
///   Value Call(function, arguments), New(class, arguments), Storage(persistent id);
///   void Append(list, span), SetItems(dict, span of keys and values), AddItems(set, span),
///        SetState(object, state).
/// They throw what is wrong with their arguments. Spans are not empty but for Tuple and FrozenSet.
/// Owns neither the bytes nor the builder; one thread at a time.
template <typename Builder>
class ObjectMachine {
 public:
  using Value = typename Builder::Value;

  /// `what` begins messages.
  ObjectMachine(std::span<const std::byte> bytes, std::string what, Builder& builder)
      : size_(bytes.size()), tokens_(bytes, std::move(what), Opcodes::kAll), builder_(builder) {}

  /// Runs one opcode; false once it was STOP, and the value has been taken off the stack. Throws
  /// CorruptionError for a pickle that is malformed, Error for an opcode that torch.save does not
  /// write, and what the builder throws.
  bool Step() {
    const Token token = tokens_.Next();
    if (token.op == Op::kStop) {
      Entry result = Pop();
      RefuseFunctions(result.functions);
      result_ = std::move(result.value);
      return false;
    }
    Run(token);
    return true;
  }
  /// The pickle's value, once Step has returned false.
  const Value& result() const { return result_; }
  /// Bytes up to the last token's end.
  size_t consumed() const { return size_ - tokens_.remaining(); }

 private:
  enum class Functions : uint8_t { kNone, kItself, kInTuple };
  /// What is known of a value: how many levels of values it has, itself included, and whether it is
  /// a function.
  struct Nesting {
    uint32_t depth = 1;
    Functions functions = Functions::kNone;
  };
  struct Entry : Nesting {
    Value value{};
  };

  // Longer than other functions, for it lists every opcode once and does nothing else.
  void Run(const Token& token) {
    switch (token.op) {
      case Op::kProto:
      case Op::kFrame:
        return;
      case Op::kMark:
        return marks_.push_back(stack_.size());
      case Op::kPop:
        return Discard();
      case Op::kPopMark:
        PopToMark();
        return values_.clear();
      case Op::kDup:
        return stack_.push_back(Entry(Top()));
      case Op::kNone:
        return Push(builder_.None());
      case Op::kNewTrue:
      case Op::kNewFalse:
        return Push(builder_.Bool(token.op == Op::kNewTrue));
      case Op::kBinInt:
        return Push(builder_.Int(static_cast<int32_t>(token.number)));
      case Op::kBinInt1:
      case Op::kBinInt2:
        return Push(builder_.Int(static_cast<int64_t>(token.number)));
      case Op::kLong1:
      case Op::kLong4:
        return Push(Long(token.text));
      case Op::kBinFloat:
        return Push(builder_.Float(BigEndianDouble(token.number)));
      case Op::kShortBinString:
      case Op::kBinUnicode:
      case Op::kShortBinUnicode:
      case Op::kBinUnicode8:
        return Push(Text(token));
      case Op::kBinBytes:
      case Op::kShortBinBytes:
      case Op::kBinBytes8:
        return Push(builder_.Bytes(token.text));
      case Op::kByteArray8:
        return Push(builder_.ByteArray(token.text));
      case Op::kEmptyList:
        return Push(builder_.List());
      case Op::kEmptyDict:
        return Push(builder_.Dict());
      case Op::kEmptySet:
        return Push(builder_.Set());
      case Op::kFrozenSet:
        return PushFrozenSet();
      case Op::kEmptyTuple:
      case Op::kTuple1:
      case Op::kTuple2:
      case Op::kTuple3:
        return PushTuple(PopItems(ShortTupleSize(token.op)));
      case Op::kTuple:
        return PushTuple(PopToMark());
      case Op::kAppend:
        return Fill(PopItems(1), &Builder::Append);
      case Op::kAppends:
        return Fill(PopToMark(), &Builder::Append);
      case Op::kSetItem:
        return Fill(PopItems(2), &Builder::SetItems);
      case Op::kSetItems:
        return SetItems();
      case Op::kAddItems:
        return Fill(PopToMark(), &Builder::AddItems);
      case Op::kBinPut:
      case Op::kLongBinPut:
        return Memoize(token.number);
      case Op::kMemoize:
        return Memoize(memo_.size());
      case Op::kBinGet:
      case Op::kLongBinGet:
        return Recall(token.number);
      case Op::kGlobal:
        return PushMade(1, builder_.Global(token.text, token.second_line));
      case Op::kStackGlobal:
        return Combine(&Builder::DottedGlobal);
      case Op::kBinPersId:
        return Push(builder_.Storage(Pop().value));
      case Op::kReduce:
        return Combine(&Builder::Call);
      case Op::kNewObj:
        return Combine(&Builder::New);
      case Op::kBuild:
        return Build();
      default:
        throw base::Error("opcode " + std::string(OpcodeName(token.op)));
    }
  }

  static double BigEndianDouble(uint64_t little_endian) {
    uint64_t bits = 0;
    for (int i = 0; i < 8; ++i) bits = bits << 8 | (little_endian >> (8 * i) & 0xff);
    return std::bit_cast<double>(bits);
  }
  static size_t ShortTupleSize(Op op) {
    if (op == Op::kEmptyTuple) return 0;
    return static_cast<size_t>(op) - static_cast<size_t>(Op::kTuple1) + 1;
  }
  Value Long(std::string_view bytes) {
    return bytes.size() <= 8 ? builder_.Int(LittleEndianInteger(bytes)) : builder_.LargeInt(bytes);
  }
  // SHORT_BINSTRING, which Python 2 wrote, has bytes of no known encoding: ASCII is left to it.
  Value Text(const Token& token) {
    const auto is_ascii = [](char c) { return static_cast<uint8_t>(c) < 0x80; };
    const bool holds = token.op == Op::kShortBinString
                           ? std::all_of(token.text.begin(), token.text.end(), is_ascii)
                           : IsPickleUtf8(token.text);
    if (!holds) tokens_.Fail("a str in UTF-8", "other bytes");
    return builder_.Text(token.text);
  }

  void SetItems() {
    const Nesting items = PopToMark();
    if (values_.size() % 2 != 0) tokens_.Fail("keys with values", "a key without one");
    Fill(items, &Builder::SetItems);
  }
  void Fill(Nesting items, void (Builder::*fill)(Value&, std::span<Value>)) {
    RefuseFunctions(items.functions);
    Entry& holder = Top();
    holder.depth = std::max(holder.depth, Around(items.depth));
    if (!values_.empty()) (builder_.*fill)(holder.value, values_);
    values_.clear();
  }
  void Memoize(uint64_t index) { memo_.insert_or_assign(index, Top()); }
  void Recall(uint64_t index) {
    const auto found = memo_.find(index);
    if (found == memo_.end())
      tokens_.Fail("a memo entry", "none of index " + std::to_string(index));
    stack_.push_back(found->second);
  }
  // Two values become one: a function and its arguments, say.
  void Combine(Value (Builder::*combine)(const Value&, const Value&)) {
    const Entry second = Pop(), first = Pop();
    const uint32_t depth = Around(std::max(first.depth, second.depth));
    PushMade(depth, (builder_.*combine)(first.value, second.value));
  }
  void Build() {
    const Entry state = Pop();
    RefuseFunctions(state.functions);
    Entry& object = Top();
    object.depth = std::max(object.depth, Around(state.depth));
    builder_.SetState(object.value, state.value);
  }

  uint32_t Around(uint32_t depth) const {
    if (depth >= kMaxObjectDepth)
      tokens_.Fail("values at most " + std::to_string(kMaxObjectDepth) + " deep", "deeper ones");
    return depth + 1;
  }
  static void RefuseFunctions(Functions functions) {
    if (functions != Functions::kNone)
      throw base::Error("it holds a function, or a class that is called here and not kept");
  }
  void Push(Value value) { stack_.push_back({{}, std::move(value)}); }
  void PushMade(uint32_t depth, Value value) {
    const auto functions = builder_.IsFunction(value) ? Functions::kItself : Functions::kNone;
    stack_.push_back({{depth, functions}, std::move(value)});
  }
  void PushTuple(Nesting items) {
    if (items.functions == Functions::kInTuple) RefuseFunctions(items.functions);
    const bool holds = items.functions == Functions::kItself;
    const auto functions = holds ? Functions::kInTuple : Functions::kNone;
    stack_.push_back({{Around(items.depth), functions}, builder_.Tuple(values_)});
    values_.clear();
  }
  void PushFrozenSet() {
    const Nesting items = PopToMark();
    RefuseFunctions(items.functions);
    stack_.push_back({{Around(items.depth)}, builder_.FrozenSet(values_)});
    values_.clear();
  }

  // An operation may only touch what lies above the last mark.
  size_t Fence() const { return marks_.empty() ? 0 : marks_.back(); }
  Entry& Top() {
    if (stack_.size() <= Fence()) tokens_.Fail("a value on the stack", "none");
    return stack_.back();
  }
  Entry Pop() {
    Entry entry = std::move(Top());
    stack_.pop_back();
    return entry;
  }
  // POP also takes a mark off, if there is nothing above it.
  void Discard() {
    if (!marks_.empty() && stack_.size() == Fence()) {
      marks_.pop_back();
    } else {
      Pop();
    }
  }
  // These take values off the stack, into `values_`; the greatest of their nestings is returned.
  Nesting PopItems(size_t count) {
    if (stack_.size() - Fence() < count) tokens_.Fail("a value on the stack", "none");
    return TakeFrom(stack_.size() - count);
  }
  Nesting PopToMark() {
    if (marks_.empty()) tokens_.Fail("a mark on the stack", "none");
    const size_t mark = marks_.back();
    marks_.pop_back();
    return TakeFrom(mark);
  }
  Nesting TakeFrom(size_t first) {
    Nesting nesting{.depth = 0};
    for (size_t i = first; i < stack_.size(); ++i) {
      nesting.depth = std::max(nesting.depth, stack_[i].depth);
      nesting.functions = std::max(nesting.functions, stack_[i].functions);
      values_.push_back(std::move(stack_[i].value));
    }
    stack_.resize(first);
    return nesting;
  }

  size_t size_;
  Tokenizer tokens_;
  Builder& builder_;
  Value result_{};
  std::vector<Entry> stack_;
  std::vector<size_t> marks_;
  std::vector<Value> values_;  // taken off the stack, for the builder; empty between opcodes
  std::unordered_map<uint64_t, Entry> memo_;
};

}  // namespace hsdp_ckpt::pickle
