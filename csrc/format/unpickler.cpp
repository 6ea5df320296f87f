#include "format/unpickler.h"

#include <bit>
#include <charconv>
#include <limits>

#include "base/error.h"
#include "format/metadata.h"
#include "format/pickle_call.h"
#include "format/types.h"
#include "pickle/text.h"
#include "pickle/tokenizer.h"

namespace hsdp_ckpt::format {
namespace {

using Kind = PickleGraph::Kind;
using Id = PickleGraph::Id;
using pickle::Op;
using pickle::Token;
constexpr Id kNoId = std::numeric_limits<Id>::max();

// The machine: a stack of node ids, marks into it, a memo. An operation may only touch what lies
// above the last mark. Step passes an opcode on to the function of its group.
class Unpickler {
 public:
  Unpickler(std::span<const std::byte> pickle, const std::string& path)
      : tokens_(pickle, path, pickle::Opcodes::kPlainData), path_(path), size_(pickle.size()) {}

  PickleGraph Run();

 private:
  [[noreturn]] void Fail(std::string_view expected, std::string_view got) const {
    tokens_.Fail(expected, got);
  }

  void Step(const Token& token);
  Id Constant(Op op);
  Id Number(const Token& token);
  Id Text(const Token& token);
  Id Tuple(Op op);
  Id OtherContainer(Op op);
  void Fill(Op op);
  void Drop(Op op);
  void Remember(const Token& token);
  void Recall(const Token& token);

  template <typename Result>
  Result ParseNumber(std::string_view text) const;
  Id ParseInt(std::string_view line);
  Id ParseLong(std::string_view line);
  Id ParseUnicode(std::string_view line);
  Id LongInt(std::string_view two_complement);
  Id Utf8(std::string_view text);

  Id Top() const;
  Id Pop();
  Id Pop(Kind kind);
  std::vector<Id> PopToMark();
  std::vector<Id> PopPairsToMark();
  void Extend(Kind kind, std::span<const Id> items);
  void Memoize(uint64_t index);
  void PushMemo(uint64_t index);

  Id GlobalNode(std::string_view module, std::string_view name);
  Id StackGlobal();
  PickleGlobal GlobalOf(Id id) const;
  Id Instance(Id cls);
  Id NewObject();
  Id Reduce();
  void Build();

  pickle::Tokenizer tokens_;
  const std::string& path_;
  size_t size_;
  PickleGraph graph_;
  std::vector<Id> stack_;
  std::vector<size_t> marks_;
  std::vector<Id> memo_;
  size_t memo_count_ = 0;
};

PickleGraph Unpickler::Run() {
  static_assert(kMaxMetadataBytes < kNoId);
  if (size_ > static_cast<uint64_t>(kMaxMetadataBytes))
    throw base::Error(path_ + ": " + std::to_string(size_) + " bytes are too many for metadata");
  for (Token token = tokens_.Next(); token.op != Op::kStop; token = tokens_.Next()) Step(token);
  if (tokens_.remaining() != 0)
    Fail("the end of the file after STOP", std::to_string(tokens_.remaining()) + " more bytes");
  if (stack_.size() != 1 || !marks_.empty())
    Fail("one value at STOP", std::to_string(stack_.size()) + " values");
  graph_.set_root(stack_[0]);
  return std::move(graph_);
}

// ---- opcodes by group

// Longer than other functions, for it lists every opcode once and does nothing else.
void Unpickler::Step(const Token& token) {
  switch (token.op) {
    case Op::kProto:
      if (token.number > 5) Fail("protocol 0 to 5", std::to_string(token.number));
      return;
    case Op::kFrame:
      if (token.number > tokens_.remaining())
        Fail("a frame inside the file", std::to_string(token.number));
      return;
    case Op::kMark:
      return marks_.push_back(stack_.size());
    case Op::kPop:
    case Op::kPopMark:
      return Drop(token.op);
    case Op::kDup:
      return stack_.push_back(Top());
    case Op::kNone:
    case Op::kNewTrue:
    case Op::kNewFalse:
      return stack_.push_back(Constant(token.op));
    case Op::kInt:
    case Op::kLong:
    case Op::kFloat:
    case Op::kBinInt:
    case Op::kBinInt1:
    case Op::kBinInt2:
    case Op::kLong1:
    case Op::kLong4:
    case Op::kBinFloat:
      return stack_.push_back(Number(token));
    case Op::kUnicode:
    case Op::kShortBinUnicode:
    case Op::kBinUnicode:
    case Op::kBinUnicode8:
    case Op::kShortBinBytes:
    case Op::kBinBytes:
    case Op::kBinBytes8:
      return stack_.push_back(Text(token));
    case Op::kEmptyTuple:
    case Op::kTuple1:
    case Op::kTuple2:
    case Op::kTuple3:
    case Op::kTuple:
      return stack_.push_back(Tuple(token.op));
    case Op::kEmptyList:
    case Op::kList:
    case Op::kEmptyDict:
    case Op::kDict:
    case Op::kEmptySet:
    case Op::kFrozenSet:
      return stack_.push_back(OtherContainer(token.op));
    case Op::kAppend:
    case Op::kAppends:
    case Op::kSetItem:
    case Op::kSetItems:
    case Op::kAddItems:
      return Fill(token.op);
    case Op::kMemoize:
    case Op::kPut:
    case Op::kBinPut:
    case Op::kLongBinPut:
      return Remember(token);
    case Op::kGet:
    case Op::kBinGet:
    case Op::kLongBinGet:
      return Recall(token);
    case Op::kGlobal:
      return stack_.push_back(GlobalNode(token.text, token.second_line));
    case Op::kStackGlobal:
      return stack_.push_back(StackGlobal());
    case Op::kReduce:
      return stack_.push_back(Reduce());
    case Op::kNewObj:
      return stack_.push_back(NewObject());
    case Op::kBuild:
      return Build();
    default:
      Fail("an opcode of plain data", "opcode " + std::to_string(static_cast<int>(token.op)));
  }
}

void Unpickler::Drop(Op op) {
  if (op == Op::kPopMark) {
    PopToMark();
  } else if (!marks_.empty() && marks_.back() == stack_.size()) {
    marks_.pop_back();
  } else {
    Pop();
  }
}

Id Unpickler::Constant(Op op) {
  if (op == Op::kNone) return graph_.Add(Kind::kNone);
  return graph_.Add(Kind::kBool, op == Op::kNewTrue ? 1 : 0);
}

Id Unpickler::Number(const Token& token) {
  switch (token.op) {
    case Op::kInt:
      return ParseInt(token.text);
    case Op::kLong:
      return ParseLong(token.text);
    case Op::kFloat:
      return graph_.AddReal(ParseNumber<double>(token.text));
    case Op::kBinFloat:  // big-endian, alone among pickle's numbers
      return graph_.AddReal(std::bit_cast<double>(__builtin_bswap64(token.number)));
    case Op::kLong1:
    case Op::kLong4:
      return LongInt(token.text);
    case Op::kBinInt:
      return graph_.Add(Kind::kInt, static_cast<int32_t>(token.number));
    default:
      return graph_.Add(Kind::kInt, static_cast<int64_t>(token.number));
  }
}

Id Unpickler::Text(const Token& token) {
  switch (token.op) {
    case Op::kUnicode:
      return ParseUnicode(token.text);
    case Op::kShortBinUnicode:
    case Op::kBinUnicode:
    case Op::kBinUnicode8:
      return Utf8(token.text);
    default:
      return graph_.AddText(Kind::kBytes, token.text);
  }
}

Id Unpickler::Tuple(Op op) {
  switch (op) {
    case Op::kEmptyTuple:
      return graph_.AddItems(Kind::kTuple, {});
    case Op::kTuple1: {
      const Id a = Pop();
      return graph_.AddItems(Kind::kTuple, {a});
    }
    case Op::kTuple2: {
      const Id b = Pop(), a = Pop();
      return graph_.AddItems(Kind::kTuple, {a, b});
    }
    case Op::kTuple3: {
      const Id c = Pop(), b = Pop(), a = Pop();
      return graph_.AddItems(Kind::kTuple, {a, b, c});
    }
    default:
      return graph_.AddItems(Kind::kTuple, PopToMark());
  }
}

Id Unpickler::OtherContainer(Op op) {
  switch (op) {
    case Op::kEmptyList:
      return graph_.AddItems(Kind::kList, {});
    case Op::kList:
      return graph_.AddItems(Kind::kList, PopToMark());
    case Op::kEmptyDict:
      return graph_.AddItems(Kind::kDict, {});
    case Op::kDict:
      return graph_.AddItems(Kind::kDict, PopPairsToMark());
    case Op::kEmptySet:
      return graph_.AddItems(Kind::kSet, {});
    default:
      return graph_.AddItems(Kind::kFrozenSet, PopToMark());
  }
}

// Values go into the container that lies below them.
void Unpickler::Fill(Op op) {
  switch (op) {
    case Op::kAppend: {
      const Id item = Pop();
      return Extend(Kind::kList, {&item, 1});
    }
    case Op::kAppends:
      return Extend(Kind::kList, PopToMark());
    case Op::kSetItem: {
      const Id value = Pop(), key = Pop();
      const Id pair[] = {key, value};
      return Extend(Kind::kDict, pair);
    }
    case Op::kSetItems:
      return Extend(Kind::kDict, PopPairsToMark());
    default:
      return Extend(Kind::kSet, PopToMark());
  }
}

void Unpickler::Remember(const Token& token) {
  if (token.op == Op::kMemoize) return Memoize(memo_count_);
  Memoize(token.op == Op::kPut ? ParseNumber<uint64_t>(token.text) : token.number);
}

void Unpickler::Recall(const Token& token) {
  PushMemo(token.op == Op::kGet ? ParseNumber<uint64_t>(token.text) : token.number);
}

// ---- values

template <typename Result>
Result Unpickler::ParseNumber(std::string_view text) const {
  Result value{};
  const char* end = text.data() + text.size();
  const auto [parsed, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || parsed != end) Fail("a number", text.substr(0, 40));
  return value;
}

Id Unpickler::ParseInt(std::string_view line) {
  // Protocol 0 writes True as 01 and False as 00.
  if (line == "00" || line == "01") return graph_.Add(Kind::kBool, line[1] - '0');
  return graph_.Add(Kind::kInt, ParseNumber<int64_t>(line));
}

Id Unpickler::ParseLong(std::string_view line) {
  if (line.ends_with('L')) line.remove_suffix(1);
  return graph_.Add(Kind::kInt, ParseNumber<int64_t>(line));
}

Id Unpickler::ParseUnicode(std::string_view line) {
  std::optional<std::string> text = pickle::DecodeRawUnicodeEscape(line);
  if (!text) Fail("a str in raw-unicode-escape", "a malformed escape");
  return graph_.AddOwnedText(Kind::kString, *std::move(text));
}

Id Unpickler::LongInt(std::string_view two_complement) {
  if (two_complement.size() > 8) return graph_.AddText(Kind::kBigInt, two_complement);
  return graph_.Add(Kind::kInt, pickle::LittleEndianInteger(two_complement));
}

Id Unpickler::Utf8(std::string_view text) {
  if (!pickle::IsPickleUtf8(text)) Fail("a str in UTF-8", "other bytes");
  return graph_.AddText(Kind::kString, text);
}

// ---- stack and memo

Id Unpickler::Top() const {
  const size_t fence = marks_.empty() ? 0 : marks_.back();
  if (stack_.size() <= fence) Fail("a value on the stack", "none");
  return stack_.back();
}

Id Unpickler::Pop() {
  const Id id = Top();
  stack_.pop_back();
  return id;
}

Id Unpickler::Pop(Kind kind) {
  const Id id = Pop();
  if (graph_.kind(id) != kind) Fail(KindName(kind), KindName(graph_.kind(id)));
  return id;
}

std::vector<Id> Unpickler::PopToMark() {
  if (marks_.empty()) Fail("a mark on the stack", "none");
  std::vector<Id> items(stack_.begin() + static_cast<ptrdiff_t>(marks_.back()), stack_.end());
  stack_.resize(marks_.back());
  marks_.pop_back();
  return items;
}

std::vector<Id> Unpickler::PopPairsToMark() {
  std::vector<Id> items = PopToMark();
  if (items.size() % 2 != 0) Fail("keys and values", "a key without a value");
  return items;
}

void Unpickler::Extend(Kind kind, std::span<const Id> items) {
  const Id target = Top();
  if (graph_.kind(target) != kind) Fail(KindName(kind), KindName(graph_.kind(target)));
  graph_.Append(target, items);
}

void Unpickler::Memoize(uint64_t index) {
  // Picklers number their entries from 0, so an index beyond the number of bytes is nothing they
  // write.
  if (index >= size_) Fail("a memo index below " + std::to_string(size_), std::to_string(index));
  if (index >= memo_.size()) memo_.resize(index + 1, kNoId);
  const Id value = Top();
  memo_count_ += memo_[index] == kNoId;
  memo_[index] = value;
}

void Unpickler::PushMemo(uint64_t index) {
  if (index >= memo_.size() || memo_[index] == kNoId)
    Fail("a memo entry", "none of index " + std::to_string(index));
  stack_.push_back(memo_[index]);
}

// ---- globals and what is made of them

Id Unpickler::GlobalNode(std::string_view module, std::string_view name) {
  if (module == "torch") {
    if (const auto dtype = DtypeFromName(name))
      return graph_.Add(Kind::kDtype, static_cast<int64_t>(*dtype));
  }
  if (const auto global = FindGlobal(module, name)) return graph_.AddGlobal(*global);
  throw base::Error(path_ + ": " + tokens_.Place() + " names " +
                    std::string(module.substr(0, 200)) + "." + std::string(name.substr(0, 200)) +
                    ", which is neither a class of torch.distributed.checkpoint's metadata nor "
                    "plain data; nothing was run. If you trust the file, load and save it again "
                    "with stock torch and a planner whose data is plain");
}

Id Unpickler::StackGlobal() {
  const Id name = Pop(Kind::kString), module = Pop(Kind::kString);
  return GlobalNode(graph_.text(module), graph_.text(name));
}

PickleGlobal Unpickler::GlobalOf(Id id) const {
  if (graph_.kind(id) != Kind::kGlobal) Fail("a class", KindName(graph_.kind(id)));
  return static_cast<PickleGlobal>(graph_.integer(id));
}

Id Unpickler::Instance(Id cls) {
  const PickleGlobal global = GlobalOf(cls);
  if (!IsClass(global)) Fail("a class of DCP's metadata", graph_.text(cls));
  return graph_.AddItems(Kind::kObject, {}, static_cast<int64_t>(global));
}

Id Unpickler::NewObject() {
  const Id arguments = Pop(Kind::kTuple);
  if (!graph_.items(arguments).empty()) Fail("no arguments to a class", "some");
  return Instance(Pop());
}

Id Unpickler::Reduce() {
  const Id arguments = Pop(Kind::kTuple);
  const Id function = Pop();
  const PickleGlobal global = GlobalOf(function);
  if (!IsCallable(global)) Fail("a callable of DCP's metadata", graph_.text(function));
  const bool instance =
      global == PickleGlobal::kReconstructor || global == PickleGlobal::kNewObject;
  const std::optional<Id> made = instance ? InstanceClass(graph_, function, arguments)
                                          : EvaluateCall(graph_, function, arguments);
  if (!made) Fail("the arguments of " + std::string(graph_.text(function)), "others");
  return instance ? Instance(*made) : *made;
}

void Unpickler::Build() {
  const Id state = Pop();
  const Id target = Top();
  if (graph_.kind(target) != Kind::kObject)
    Fail("an instance to set the state of", KindName(graph_.kind(target)));
  if (!graph_.items(target).empty()) Fail("one state an instance", "a second one");
  graph_.Append(target, {&state, 1});
}

}  // namespace

PickleGraph Unpickle(std::span<const std::byte> pickle, const std::string& path) {
  return Unpickler(pickle, path).Run();
}

}  // namespace hsdp_ckpt::format
