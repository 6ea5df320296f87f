#include "format/unpickler.h"

#include <bit>
#include <charconv>
#include <cstring>
#include <limits>

#include "base/error.h"
#include "format/metadata.h"
#include "format/types.h"
#include "pickle/opcodes.h"
#include "pickle/text.h"

namespace hsdp_ckpt::format {
namespace {

using Kind = PickleGraph::Kind;
using Id = PickleGraph::Id;
constexpr Id kNoId = std::numeric_limits<Id>::max();

struct AllowedGlobal {
  std::string_view module;
  std::string_view name;
  PickleGlobal global;
};

constexpr std::string_view kDcp = "torch.distributed.checkpoint.metadata";
constexpr std::string_view kOldDcp =
    "torch.distributed._shard.sharded_tensor.metadata";  // its home before torch 2.4
constexpr AllowedGlobal kAllowed[] = {
    {kDcp, "Metadata", PickleGlobal::kMetadata},
    {kDcp, "TensorStorageMetadata", PickleGlobal::kTensorStorageMetadata},
    {kDcp, "BytesStorageMetadata", PickleGlobal::kBytesStorageMetadata},
    {kDcp, "ChunkStorageMetadata", PickleGlobal::kChunkStorageMetadata},
    {kDcp, "TensorProperties", PickleGlobal::kTensorProperties},
    {kOldDcp, "TensorProperties", PickleGlobal::kTensorProperties},
    {kDcp, "_MEM_FORMAT_ENCODING", PickleGlobal::kMemoryFormat},
    {kOldDcp, "MEM_FORMAT_ENCODING", PickleGlobal::kMemoryFormat},
    {kDcp, "MetadataIndex", PickleGlobal::kMetadataIndex},
    {kDcp, "StorageMeta", PickleGlobal::kStorageMeta},
    {"torch.distributed.checkpoint.filesystem", "_StorageInfo", PickleGlobal::kStorageInfo},
    {"torch", "Size", PickleGlobal::kSize},
    {"torch.serialization", "_get_layout", PickleGlobal::kGetLayout},
    // A checkpoint id may be a path; Python 3.13 moved the classes for a while.
    {"pathlib", "PosixPath", PickleGlobal::kPathlib},
    {"pathlib", "PurePosixPath", PickleGlobal::kPathlib},
    {"pathlib", "WindowsPath", PickleGlobal::kPathlib},
    {"pathlib", "PureWindowsPath", PickleGlobal::kPathlib},
    {"pathlib._local", "PosixPath", PickleGlobal::kPathlib},
    {"pathlib._local", "PurePosixPath", PickleGlobal::kPathlib},
    {"pathlib._local", "WindowsPath", PickleGlobal::kPathlib},
    {"pathlib._local", "PureWindowsPath", PickleGlobal::kPathlib},
    // Python 3.11 pickles an enum's member as getattr(class, name).
    {"builtins", "getattr", PickleGlobal::kGetattr},
    {"__builtin__", "getattr", PickleGlobal::kGetattr},
    // How protocols below 4 write sets, bytes and instances.
    {"builtins", "set", PickleGlobal::kSet},
    {"__builtin__", "set", PickleGlobal::kSet},
    {"builtins", "frozenset", PickleGlobal::kFrozenSet},
    {"__builtin__", "frozenset", PickleGlobal::kFrozenSet},
    {"builtins", "bytes", PickleGlobal::kBytes},
    {"__builtin__", "bytes", PickleGlobal::kBytes},
    {"_codecs", "encode", PickleGlobal::kCodecsEncode},
    {"copyreg", "_reconstructor", PickleGlobal::kReconstructor},
    {"copy_reg", "_reconstructor", PickleGlobal::kReconstructor},
    {"copyreg", "__newobj__", PickleGlobal::kNewObject},
    {"copy_reg", "__newobj__", PickleGlobal::kNewObject},
    {"builtins", "object", PickleGlobal::kObject},
    {"__builtin__", "object", PickleGlobal::kObject},
};

bool IsClass(PickleGlobal global) { return global <= PickleGlobal::kStorageInfo; }

}  // namespace

std::string_view KindName(Kind kind) {
  constexpr std::string_view kNames[] = {
      "None",         "a bool",          "an int",     "an int",     "a float",
      "a str",        "bytes",           "a tuple",    "a list",     "a dict",
      "a set",        "a frozenset",     "torch.Size", "a path",     "torch.dtype",
      "torch.layout", "a memory format", "a class",    "an instance"};
  return kNames[static_cast<size_t>(kind)];
}

// The machine: a stack of node ids, marks into it, a memo. An operation may only touch what lies
// above the last mark.
class Unpickler {
 public:
  Unpickler(std::span<const std::byte> pickle, const std::string& path)
      : input_(reinterpret_cast<const char*>(pickle.data()), pickle.size()), path_(path) {}

  PickleGraph Run() {
    static_assert(kMaxMetadataBytes < kNoId);
    if (input_.size() > static_cast<uint64_t>(kMaxMetadataBytes))
      throw base::Error(path_ + ": " + std::to_string(input_.size()) +
                        " bytes are too many for metadata");
    while (true) {
      op_at_ = at_;
      const auto op = static_cast<pickle::Op>(Take(1)[0]);
      if (op == pickle::Op::kStop) break;
      Step(op);
    }
    if (at_ != input_.size())
      Fail("the end of the file after STOP", std::to_string(input_.size() - at_) + " more bytes");
    if (stack_.size() != 1 || !marks_.empty())
      Fail("one value at STOP", std::to_string(stack_.size()) + " values");
    graph_.root_ = stack_[0];
    return std::move(graph_);
  }

 private:
  [[noreturn]] void Fail(std::string_view expected, std::string_view got) const {
    throw base::CorruptionError(path_, "pickle at byte " + std::to_string(op_at_),
                                std::string(expected), std::string(got));
  }

  // ---- input: every length is checked against what is left before anything is made of it
  // ---------------------------
  std::string_view Take(uint64_t count) {
    if (count > input_.size() - at_)
      Fail(std::to_string(count) + " more bytes", std::to_string(input_.size() - at_));
    const std::string_view taken = input_.substr(at_, count);
    at_ += count;
    return taken;
  }
  uint64_t TakeUnsigned(size_t bytes) {
    uint64_t value = 0;
    size_t shift = 0;
    for (const char c : Take(bytes)) {
      value |= static_cast<uint64_t>(static_cast<uint8_t>(c)) << shift;
      shift += 8;
    }
    return value;
  }
  std::string_view TakeLine() {
    const size_t end = input_.find('\n', at_);
    if (end == std::string_view::npos) Fail("a line", "the end of the file");
    const std::string_view line = input_.substr(at_, end - at_);
    at_ = end + 1;
    return line;
  }
  template <typename Number>
  Number ParseNumber(std::string_view text) const {
    Number value{};
    const char* end = text.data() + text.size();
    const auto [parsed, error] = std::from_chars(text.data(), end, value);
    if (error != std::errc() || parsed != end) Fail("a number", std::string(text.substr(0, 40)));
    return value;
  }

  // ---- nodes
  // -------------------------------------------------------------------------------------------------------
  Id Add(Kind kind, int64_t integer = 0, uint32_t aux = 0) {
    graph_.nodes_.push_back({kind, aux, {integer}});
    return static_cast<Id>(graph_.nodes_.size() - 1);
  }
  Id AddReal(double real) {
    const Id id = Add(Kind::kFloat);
    graph_.nodes_[id].real = real;
    return id;
  }
  uint32_t Text(std::string_view text) {
    graph_.texts_.push_back(text);
    return static_cast<uint32_t>(graph_.texts_.size() - 1);
  }
  std::string_view Own(std::string text) { return graph_.owned_.emplace_back(std::move(text)); }
  Id AddText(Kind kind, std::string_view text) { return Add(kind, 0, Text(text)); }
  Id AddString(std::string_view text) {
    if (!pickle::IsPickleUtf8(text)) Fail("a str in UTF-8", "other bytes");
    return AddText(Kind::kString, text);
  }
  Id AddItems(Kind kind, std::vector<Id> items, int64_t integer = 0) {
    graph_.lists_.push_back(std::move(items));
    return Add(kind, integer, static_cast<uint32_t>(graph_.lists_.size() - 1));
  }
  Id AddLong(std::string_view little_endian) {
    if (little_endian.size() > 8) return AddText(Kind::kBigInt, little_endian);
    uint64_t value = 0;
    for (size_t i = 0; i < little_endian.size(); ++i) {
      value |= static_cast<uint64_t>(static_cast<uint8_t>(little_endian[i])) << (8 * i);
    }
    const size_t unused =
        64 -
        8 * little_endian.size();  // sign-extended by shifting up and, arithmetically, down again
    return Add(Kind::kInt, unused == 64 ? 0 : static_cast<int64_t>(value << unused) >> unused);
  }

  // ---- stack
  // -------------------------------------------------------------------------------------------------------
  size_t Fence() const { return marks_.empty() ? 0 : marks_.back(); }
  void Push(Id id) { stack_.push_back(id); }
  Id Top() const {
    if (stack_.size() <= Fence()) Fail("a value on the stack", "none");
    return stack_.back();
  }
  Id Pop() {
    const Id id = Top();
    stack_.pop_back();
    return id;
  }
  Id Pop(Kind kind) {
    const Id id = Pop();
    if (graph_.kind(id) != kind) Fail(KindName(kind), KindName(graph_.kind(id)));
    return id;
  }
  std::vector<Id> PopToMark() {
    if (marks_.empty()) Fail("a mark on the stack", "none");
    std::vector<Id> items(stack_.begin() + static_cast<ptrdiff_t>(marks_.back()), stack_.end());
    stack_.resize(marks_.back());
    marks_.pop_back();
    return items;
  }
  std::vector<Id> PopPairsToMark() {
    std::vector<Id> items = PopToMark();
    if (items.size() % 2 != 0) Fail("keys and values", "a key without a value");
    return items;
  }
  // The container below the values that go into it.
  void Extend(Kind kind, std::span<const Id> items) {
    const Id target = Top();
    if (graph_.kind(target) != kind) Fail(KindName(kind), KindName(graph_.kind(target)));
    auto& list = graph_.lists_[graph_.nodes_[target].aux];
    list.insert(list.end(), items.begin(), items.end());
  }
  // A new node of another kind over the same items. Never a copy: a shared tuple could be named a
  // million times.
  Id AddView(Kind kind, Id of, int64_t integer = 0) {
    return Add(kind, integer, graph_.nodes_[of].aux);
  }

  // ---- memo
  // --------------------------------------------------------------------------------------------------------
  void Memoize(uint64_t index) {
    // Picklers number their entries from 0, so an index beyond the number of bytes is nothing they
    // write.
    if (index >= input_.size())
      Fail("a memo index below " + std::to_string(input_.size()), std::to_string(index));
    if (index >= memo_.size()) memo_.resize(index + 1, kNoId);
    const Id value = Top();
    memo_count_ += memo_[index] == kNoId;
    memo_[index] = value;
  }
  void PushMemo(uint64_t index) {
    if (index >= memo_.size() || memo_[index] == kNoId)
      Fail("a memo entry", "none of index " + std::to_string(index));
    Push(memo_[index]);
  }

  // ---- globals and what is made of them
  // ----------------------------------------------------------------------------
  Id AddGlobal(std::string_view module, std::string_view name) {
    if (module == "torch") {
      if (const auto dtype = DtypeFromName(name))
        return Add(Kind::kDtype, static_cast<int64_t>(*dtype));
    }
    for (const AllowedGlobal& allowed : kAllowed) {
      if (allowed.module == module && allowed.name == name) {
        return Add(Kind::kGlobal, static_cast<int64_t>(allowed.global), Text(allowed.name));
      }
    }
    throw base::Error(path_ + ": pickle at byte " + std::to_string(op_at_) + " names " +
                      std::string(module.substr(0, 200)) + "." + std::string(name.substr(0, 200)) +
                      ", which is neither a class of torch.distributed.checkpoint's metadata nor "
                      "plain data; nothing was run. If "
                      "you trust the file, load and save it again with stock torch and a planner "
                      "whose data is plain");
  }
  PickleGlobal Global(Id id) const {
    if (graph_.kind(id) != Kind::kGlobal) Fail("a class", KindName(graph_.kind(id)));
    return static_cast<PickleGlobal>(graph_.integer(id));
  }
  Id AddInstance(Id cls) {
    const PickleGlobal global = Global(cls);
    if (!IsClass(global)) Fail("a class of DCP's metadata", graph_.text(cls));
    return AddItems(Kind::kObject, {}, static_cast<int64_t>(global));
  }
  void Build() {
    const Id state = Pop();
    const Id target = Top();
    if (graph_.kind(target) != Kind::kObject)
      Fail("an instance to set the state of", KindName(graph_.kind(target)));
    auto& items = graph_.lists_[graph_.nodes_[target].aux];
    if (!items.empty()) Fail("one state an instance", "a second one");
    items.push_back(state);
  }
  Id Reduce() {
    const Id tuple = Pop(Kind::kTuple);
    const Id function = Pop();
    const std::span<const Id> args = graph_.items(tuple);
    const auto is = [&](size_t i, Kind kind) {
      return i < args.size() && graph_.kind(args[i]) == kind;
    };
    const auto is_sequence = [&](size_t i) { return is(i, Kind::kTuple) || is(i, Kind::kList); };
    const auto bad_arguments = [&] {
      Fail("the arguments of " + std::string(graph_.text(function)), "others");
    };
    switch (Global(function)) {
      case PickleGlobal::kSize:
        if (args.size() != 1 || !is_sequence(0)) bad_arguments();
        return AddView(Kind::kSize, args[0]);
      case PickleGlobal::kSet:
      case PickleGlobal::kFrozenSet:
        if (args.size() != 1 || !is_sequence(0)) bad_arguments();
        return AddView(Global(function) == PickleGlobal::kSet ? Kind::kSet : Kind::kFrozenSet,
                       args[0]);
      case PickleGlobal::kGetLayout: {
        constexpr std::string_view kPrefix = "torch.";
        const std::string_view name =
            args.size() == 1 && is(0, Kind::kString) ? graph_.text(args[0]) : "";
        const auto layout =
            name.starts_with(kPrefix) ? LayoutFromName(name.substr(kPrefix.size())) : std::nullopt;
        if (!layout) bad_arguments();
        return Add(Kind::kLayout, static_cast<int64_t>(*layout));
      }
      case PickleGlobal::kMemoryFormat: {
        if (args.size() != 1 || !is(0, Kind::kInt) || graph_.integer(args[0]) < 0 ||
            graph_.integer(args[0]) > 2)
          bad_arguments();
        return Add(Kind::kMemoryFormat, graph_.integer(args[0]));
      }
      case PickleGlobal::kGetattr: {
        // Not attribute access in general: only a member of this one enum.
        const bool member = args.size() == 2 && is(0, Kind::kGlobal) &&
                            Global(args[0]) == PickleGlobal::kMemoryFormat && is(1, Kind::kString);
        const auto format = member ? MemoryFormatFromName(graph_.text(args[1])) : std::nullopt;
        if (!format) bad_arguments();
        return Add(Kind::kMemoryFormat, static_cast<int64_t>(*format));
      }
      case PickleGlobal::kPathlib:
        for (size_t i = 0; i < args.size(); ++i) {
          if (!is(i, Kind::kString)) bad_arguments();
        }
        return AddView(Kind::kPath, tuple, graph_.nodes_[function].aux);
      case PickleGlobal::kBytes:
        if (!args.empty()) bad_arguments();
        return AddText(Kind::kBytes, "");
      case PickleGlobal::kCodecsEncode: {
        const bool latin1 = args.size() == 2 && is(0, Kind::kString) && is(1, Kind::kString) &&
                            graph_.text(args[1]) == "latin1";
        auto bytes = latin1 ? pickle::EncodeLatin1(graph_.text(args[0])) : std::nullopt;
        if (!bytes) bad_arguments();
        return AddText(Kind::kBytes, Own(*std::move(bytes)));
      }
      case PickleGlobal::kReconstructor:
        if (args.size() != 3 || !is(1, Kind::kGlobal) || Global(args[1]) != PickleGlobal::kObject ||
            !is(2, Kind::kNone)) {
          bad_arguments();
        }
        return AddInstance(args[0]);
      case PickleGlobal::kNewObject:
        if (args.size() != 1) bad_arguments();
        return AddInstance(args[0]);
      default:
        Fail("a callable of DCP's metadata", graph_.text(function));
    }
  }

  void Step(pickle::Op op);

  std::string_view input_;
  const std::string& path_;
  size_t at_ = 0;
  size_t op_at_ = 0;
  PickleGraph graph_;
  std::vector<Id> stack_;
  std::vector<size_t> marks_;
  std::vector<Id> memo_;
  size_t memo_count_ = 0;
};

void Unpickler::Step(pickle::Op op) {
  switch (op) {
    case pickle::Op::kProto:
      if (const uint64_t version = TakeUnsigned(1); version > 5)
        Fail("protocol 0 to 5", std::to_string(version));
      return;
    case pickle::Op::kFrame:
      if (const uint64_t size = TakeUnsigned(8); size > input_.size() - at_)
        Fail("a frame inside the file", std::to_string(size));
      return;
    case pickle::Op::kMark:
      return marks_.push_back(stack_.size());
    case pickle::Op::kPop:
      if (!marks_.empty() && marks_.back() == stack_.size()) return marks_.pop_back();
      Pop();
      return;
    case pickle::Op::kPopMark:
      PopToMark();
      return;
    case pickle::Op::kDup:
      return Push(Top());
    // Numbers, None, True, False.
    case pickle::Op::kNone:
      return Push(Add(Kind::kNone));
    case pickle::Op::kNewTrue:
      return Push(Add(Kind::kBool, 1));
    case pickle::Op::kNewFalse:
      return Push(Add(Kind::kBool, 0));
    case pickle::Op::kInt: {
      const std::string_view line = TakeLine();  // protocol 0 writes True as 01 and False as 00
      if (line == "00" || line == "01") return Push(Add(Kind::kBool, line[1] - '0'));
      return Push(Add(Kind::kInt, ParseNumber<int64_t>(line)));
    }
    case pickle::Op::kLong: {
      std::string_view line = TakeLine();
      if (line.ends_with('L')) line.remove_suffix(1);
      return Push(Add(Kind::kInt, ParseNumber<int64_t>(line)));
    }
    case pickle::Op::kBinInt:
      return Push(Add(Kind::kInt, static_cast<int32_t>(TakeUnsigned(4))));
    case pickle::Op::kBinInt1:
      return Push(Add(Kind::kInt, static_cast<int64_t>(TakeUnsigned(1))));
    case pickle::Op::kBinInt2:
      return Push(Add(Kind::kInt, static_cast<int64_t>(TakeUnsigned(2))));
    case pickle::Op::kLong1:
      return Push(AddLong(Take(TakeUnsigned(1))));
    case pickle::Op::kLong4:
      return Push(AddLong(Take(TakeUnsigned(4))));
    case pickle::Op::kFloat:
      return Push(AddReal(ParseNumber<double>(TakeLine())));
    case pickle::Op::kBinFloat: {
      uint64_t bits = 0;  // big-endian, alone among pickle's numbers
      for (const char c : Take(8)) bits = bits << 8 | static_cast<uint8_t>(c);
      return Push(AddReal(std::bit_cast<double>(bits)));
    }
    // Strings and bytes.
    case pickle::Op::kUnicode: {
      auto text = pickle::DecodeRawUnicodeEscape(TakeLine());
      if (!text) Fail("a str in raw-unicode-escape", "a malformed escape");
      return Push(AddText(Kind::kString, Own(*std::move(text))));
    }
    case pickle::Op::kShortBinUnicode:
      return Push(AddString(Take(TakeUnsigned(1))));
    case pickle::Op::kBinUnicode:
      return Push(AddString(Take(TakeUnsigned(4))));
    case pickle::Op::kBinUnicode8:
      return Push(AddString(Take(TakeUnsigned(8))));
    case pickle::Op::kShortBinBytes:
      return Push(AddText(Kind::kBytes, Take(TakeUnsigned(1))));
    case pickle::Op::kBinBytes:
      return Push(AddText(Kind::kBytes, Take(TakeUnsigned(4))));
    case pickle::Op::kBinBytes8:
      return Push(AddText(Kind::kBytes, Take(TakeUnsigned(8))));
    // Containers.
    case pickle::Op::kEmptyTuple:
      return Push(AddItems(Kind::kTuple, {}));
    case pickle::Op::kTuple1: {
      const Id a = Pop();
      return Push(AddItems(Kind::kTuple, {a}));
    }
    case pickle::Op::kTuple2: {
      const Id b = Pop(), a = Pop();
      return Push(AddItems(Kind::kTuple, {a, b}));
    }
    case pickle::Op::kTuple3: {
      const Id c = Pop(), b = Pop(), a = Pop();
      return Push(AddItems(Kind::kTuple, {a, b, c}));
    }
    case pickle::Op::kTuple:
      return Push(AddItems(Kind::kTuple, PopToMark()));
    case pickle::Op::kEmptyList:
      return Push(AddItems(Kind::kList, {}));
    case pickle::Op::kList:
      return Push(AddItems(Kind::kList, PopToMark()));
    case pickle::Op::kAppend: {
      const Id item = Pop();
      return Extend(Kind::kList, {&item, 1});
    }
    case pickle::Op::kAppends:
      return Extend(Kind::kList, PopToMark());
    case pickle::Op::kEmptyDict:
      return Push(AddItems(Kind::kDict, {}));
    case pickle::Op::kDict:
      return Push(AddItems(Kind::kDict, PopPairsToMark()));
    case pickle::Op::kSetItem: {
      const Id value = Pop(), key = Pop();
      const Id pair[] = {key, value};
      return Extend(Kind::kDict, pair);
    }
    case pickle::Op::kSetItems:
      return Extend(Kind::kDict, PopPairsToMark());
    case pickle::Op::kEmptySet:
      return Push(AddItems(Kind::kSet, {}));
    case pickle::Op::kAddItems:
      return Extend(Kind::kSet, PopToMark());
    case pickle::Op::kFrozenSet:
      return Push(AddItems(Kind::kFrozenSet, PopToMark()));
    // The memo.
    case pickle::Op::kMemoize:
      return Memoize(memo_count_);
    case pickle::Op::kPut:
      return Memoize(ParseNumber<uint64_t>(TakeLine()));
    case pickle::Op::kBinPut:
      return Memoize(TakeUnsigned(1));
    case pickle::Op::kLongBinPut:
      return Memoize(TakeUnsigned(4));
    case pickle::Op::kGet:
      return PushMemo(ParseNumber<uint64_t>(TakeLine()));
    case pickle::Op::kBinGet:
      return PushMemo(TakeUnsigned(1));
    case pickle::Op::kLongBinGet:
      return PushMemo(TakeUnsigned(4));
    // Globals and instances.
    case pickle::Op::kGlobal: {
      const std::string_view module = TakeLine();
      return Push(AddGlobal(module, TakeLine()));
    }
    case pickle::Op::kStackGlobal: {
      const Id name = Pop(Kind::kString), module = Pop(Kind::kString);
      return Push(AddGlobal(graph_.text(module), graph_.text(name)));
    }
    case pickle::Op::kReduce:
      return Push(Reduce());
    case pickle::Op::kNewObj:
      if (const Id args = Pop(Kind::kTuple); !graph_.items(args).empty())
        Fail("no arguments to a class", "some");
      return Push(AddInstance(Pop()));
    case pickle::Op::kBuild:
      return Build();
    case pickle::Op::kStop:
      break;  // Run ends there
  }
  Fail("an opcode of plain data", "opcode " + std::to_string(static_cast<int>(op)));
}

PickleGraph Unpickle(std::span<const std::byte> pickle, const std::string& path) {
  return Unpickler(pickle, path).Run();
}

}  // namespace hsdp_ckpt::format
