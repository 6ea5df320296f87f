#include "pickle/object_check.h"

#include <algorithm>
#include <limits>

#include "base/bytes.h"
#include "base/error.h"
#include "pickle/text.h"
#include "pickle/tokenizer.h"

namespace hsdp_ckpt::pickle {
namespace {

// LONG1's value, as near as a number can be to it.
int64_t SaturatedInteger(std::string_view two_complement) {
  if (two_complement.size() <= 8) return LittleEndianInteger(two_complement);
  const bool negative = (static_cast<uint8_t>(two_complement.back()) & 0x80) != 0;
  const char padding = negative ? '\xff' : '\0';
  const std::string_view low = two_complement.substr(0, 8), high = two_complement.substr(8);
  const int64_t value = LittleEndianInteger(low);
  const bool fits = high.find_first_not_of(padding) == std::string_view::npos;
  if (fits && (value < 0) == negative) return value;
  return negative ? std::numeric_limits<int64_t>::min() : std::numeric_limits<int64_t>::max();
}

uint64_t CountCharacters(std::string_view utf8) {
  return static_cast<uint64_t>(std::count_if(
      utf8.begin(), utf8.end(), [](char c) { return (static_cast<uint8_t>(c) & 0xC0) != 0x80; }));
}

// The opcodes that torch's own unpickler knows, on ObjectValues. An operation may only touch what
// lies above the last mark.
class ObjectMachine {
 public:
  ObjectMachine(std::span<const std::byte> bytes, ObjectCosts& costs)
      : size_(bytes.size()), tokens_(bytes, costs.what(), Opcodes::kAll), costs_(costs) {}

  size_t Run() {
    for (Token token = tokens_.Next(); token.op != Op::kStop; token = tokens_.Next()) Step(token);
    return size_ - tokens_.remaining();
  }

 private:
  // Longer than other functions, for it lists every opcode once and does nothing else.
  void Step(const Token& token) {
    switch (token.op) {
      case Op::kProto:
        return;
      case Op::kMark:
        return marks_.push_back(stack_.size());
      case Op::kNone:
      case Op::kNewTrue:
      case Op::kNewFalse:
      case Op::kBinFloat:
      case Op::kEmptyList:
      case Op::kEmptyDict:
      case Op::kEmptySet:
        return stack_.push_back(std::make_shared<ObjectValue>());
      case Op::kBinInt:
      case Op::kBinInt1:
      case Op::kBinInt2:
      case Op::kLong1:
        return stack_.push_back(Number(token));
      case Op::kBinUnicode:
      case Op::kShortBinString:
        return stack_.push_back(Text(token));
      case Op::kEmptyTuple:
      case Op::kTuple1:
      case Op::kTuple2:
      case Op::kTuple3:
      case Op::kTuple:
        return stack_.push_back(Tuple(token.op));
      case Op::kAppend:
      case Op::kAppends:
      case Op::kSetItem:
      case Op::kSetItems:
        return Fill(token.op);
      case Op::kBinPut:
      case Op::kLongBinPut:
        memo_[token.number] = Top();
        return;
      case Op::kBinGet:
      case Op::kLongBinGet:
        return Recall(token.number);
      case Op::kGlobal:
        return stack_.push_back(costs_.Global(token.text, token.second_line));
      case Op::kBinPersId:
        return stack_.push_back(costs_.Storage(*Pop()));
      case Op::kReduce:
      case Op::kNewObj:
        return stack_.push_back(Call());
      case Op::kBuild:
        return Build();
      default:
        throw base::Error("opcode " + std::string(OpcodeName(token.op)));
    }
  }

  ObjectPtr Number(const Token& token) const {
    auto value = std::make_shared<ObjectValue>();
    if (token.op == Op::kLong1) {
      value->number = SaturatedInteger(token.text);
    } else if (token.op == Op::kBinInt) {
      value->number = static_cast<int32_t>(token.number);
    } else {
      value->number = static_cast<int64_t>(token.number);
    }
    return value;
  }
  ObjectPtr Text(const Token& token) const {
    const bool is_utf8 = token.op == Op::kBinUnicode;
    if (is_utf8 && !IsPickleUtf8(token.text)) tokens_.Fail("a str in UTF-8", "other bytes");
    auto value = std::make_shared<ObjectValue>();
    value->text = token.text;
    value->length = is_utf8 ? CountCharacters(token.text) : token.text.size();
    return value;
  }
  ObjectPtr Tuple(Op op) {
    auto value = std::make_shared<ObjectValue>();
    value->items = op == Op::kTuple ? PopToMark() : PopItems(ShortTupleSize(op));
    value->length = value->items->size();
    return value;
  }
  static size_t ShortTupleSize(Op op) {
    if (op == Op::kEmptyTuple) return 0;
    return static_cast<size_t>(op) - static_cast<size_t>(Op::kTuple1) + 1;
  }

  void Fill(Op op) {
    size_t added = 1;  // what a dict's item counts as, too
    if (op == Op::kAppend || op == Op::kSetItem) {
      PopItems(op == Op::kAppend ? 1 : 2);
    } else {
      added = PopToMark().size();
    }
    Top()->length += added;
  }
  void Recall(uint64_t index) {
    const auto found = memo_.find(index);
    if (found == memo_.end())
      tokens_.Fail("a memo entry", "none of index " + std::to_string(index));
    stack_.push_back(found->second);
  }
  ObjectPtr Call() {
    const ObjectPtr arguments = Pop();
    const ObjectPtr function = Pop();
    return costs_.Call(*function, *arguments);
  }
  void Build() {
    const ObjectPtr state = Pop();
    if (Top()->elements) costs_.Fail("its pickle sets a tensor anew");
    costs_.SetState(*state);
  }

  size_t Fence() const { return marks_.empty() ? 0 : marks_.back(); }
  const ObjectPtr& Top() const {
    if (stack_.size() <= Fence()) tokens_.Fail("a value on the stack", "none");
    return stack_.back();
  }
  ObjectPtr Pop() {
    ObjectPtr value = Top();
    stack_.pop_back();
    return value;
  }
  ObjectItems PopItems(size_t count) {
    if (stack_.size() - Fence() < count) tokens_.Fail("a value on the stack", "none");
    return TakeFrom(stack_.size() - count);
  }
  ObjectItems PopToMark() {
    if (marks_.empty()) tokens_.Fail("a mark on the stack", "none");
    const size_t mark = marks_.back();
    marks_.pop_back();
    return TakeFrom(mark);
  }
  ObjectItems TakeFrom(size_t first) {
    const auto begin = stack_.begin() + static_cast<std::ptrdiff_t>(first);
    ObjectItems items(std::make_move_iterator(begin), std::make_move_iterator(stack_.end()));
    stack_.resize(first);
    return items;
  }

  size_t size_;
  Tokenizer tokens_;
  ObjectCosts& costs_;
  ObjectItems stack_;
  std::vector<size_t> marks_;
  std::unordered_map<uint64_t, ObjectPtr> memo_;
};

bool IsWordByte(char c) {
  const bool is_letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
  return is_letter || (c >= '0' && c <= '9') || c == '_' || c == '.';
}

}  // namespace

size_t CheckPickle(std::span<const std::byte> bytes, ObjectCosts& costs) {
  return ObjectMachine(bytes, costs).Run();
}

// A GLOBAL is "c", a module's line and an attribute's line. Bytes of other opcodes may stand before
// it without a gap, so its "c" can be anywhere in the run of word bytes but at the run's end.
bool NamesGlobal(std::span<const std::byte> bytes) {
  const std::string_view text = base::AsText(bytes);
  size_t line = 0;
  for (size_t end = text.find('\n'); end != std::string_view::npos; end = text.find('\n', line)) {
    size_t module = end;
    while (module > line && IsWordByte(text[module - 1])) --module;
    const size_t opcode = text.substr(module, end - module).find('c');
    size_t attribute = end + 1;
    while (attribute < text.size() && IsWordByte(text[attribute])) ++attribute;
    const bool has_module = opcode != std::string_view::npos && module + opcode + 1 < end;
    const bool has_attribute = attribute > end + 1 && attribute < text.size();
    if (has_module && has_attribute && text[attribute] == '\n') return true;
    line = end + 1;
  }
  return false;
}

}  // namespace hsdp_ckpt::pickle
