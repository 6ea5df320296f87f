// DecodeTensorPickle: a stack machine for the few opcodes that a plain tensor's pickle has.
#include <algorithm>
#include <iterator>
#include <map>
#include <utility>
#include <variant>

#include "base/error.h"
#include "format/tensor_pickle.h"
#include "pickle/tokenizer.h"

namespace hsdp_ckpt::format {
namespace {

using pickle::Op;
using pickle::Token;

// What the stack can hold. A Storage is what a persistent id gave, the last two are what a REDUCE
// gave. A global's name is "module attribute".
struct Mark {};
struct Value;
using Tuple = std::vector<Value>;
struct Global {
  std::string name;
};
struct Storage {
  std::string type;
  std::string key;
  int64_t numel;
};
struct OrderedDict {};
struct Value {
  std::variant<Mark, bool, int64_t, std::string, Tuple, Global, Storage, OrderedDict,
               TensorDescription>
      v;
};

template <typename T>
const T* As(const Value& value) {
  return std::get_if<T>(&value.v);
}

constexpr size_t kMaxPickle = 64 << 10;  // a plain tensor's is some hundred bytes
constexpr size_t kMaxStack = 1000;
// Names of classes, "storage", "0", "cuda:7". Few bytes recall a text from the memo, so long ones
// would add up.
constexpr size_t kMaxText = 256;
constexpr std::string_view kTorch = "torch ";

// ---- torch._utils._rebuild_tensor_v2 and v3

std::optional<std::vector<int64_t>> Integers(const Value& value) {
  const auto* tuple = As<Tuple>(value);
  if (tuple == nullptr) return std::nullopt;
  std::vector<int64_t> out;
  for (const Value& item : *tuple) {
    const auto* number = As<int64_t>(item);
    if (number == nullptr || *number < 0) return std::nullopt;
    out.push_back(*number);
  }
  return out;
}

// v2: the class of the typed storage says it.
const RecordDtype* DtypeOfStorage(const Storage& storage) {
  if (!storage.type.starts_with(kTorch)) return nullptr;
  return FindRecordDtypeOfStorage(std::string_view(storage.type).substr(kTorch.size()));
}

// v3: it is the last argument, and the storage is untyped.
const RecordDtype* DtypeArgument(const Storage& storage, const Value& argument) {
  const auto* dtype = As<Global>(argument);
  if (dtype == nullptr || !dtype->name.starts_with(kTorch)) return nullptr;
  if (storage.type != "torch.storage UntypedStorage") return nullptr;
  return FindRecordDtype(std::string_view(dtype->name).substr(kTorch.size()));
}

bool LiesInStorage(const TensorDescription& tensor) {
  int64_t last = tensor.storage_offset;  // the last element that is addressed
  bool empty = false;
  for (size_t i = 0; i < tensor.shape.size(); ++i) {
    if (tensor.shape[i] == 0) {
      empty = true;
      continue;
    }
    int64_t reach;
    if (__builtin_mul_overflow(tensor.shape[i] - 1, tensor.stride[i], &reach)) return false;
    if (__builtin_add_overflow(last, reach, &last)) return false;
  }
  return empty || last < tensor.storage_bytes / tensor.dtype->size;
}

// What both functions are called with: (storage, offset, size, stride, requires_grad, hooks), and
// v3 with the dtype at the end.
std::optional<TensorDescription> Rebuild(const std::string& function, const Tuple& args) {
  const bool v3 = function == "torch._utils _rebuild_tensor_v3";
  if (!v3 && function != "torch._utils _rebuild_tensor_v2") return std::nullopt;
  if (args.size() != (v3 ? 7u : 6u)) return std::nullopt;
  const auto* storage = As<Storage>(args[0]);
  const auto* offset = As<int64_t>(args[1]);
  const auto shape = Integers(args[2]);
  const auto stride = Integers(args[3]);
  if (!storage || storage->key != "0" || !offset || *offset < 0) return std::nullopt;
  if (!shape || !stride || shape->size() != stride->size()) return std::nullopt;
  if (!As<bool>(args[4]) || !As<OrderedDict>(args[5])) return std::nullopt;

  const RecordDtype* dtype = v3 ? DtypeArgument(*storage, args[6]) : DtypeOfStorage(*storage);
  if (dtype == nullptr) return std::nullopt;
  TensorDescription tensor{dtype, *shape, *stride, *offset, 0};
  const int64_t unit = v3 ? 1 : dtype->size;
  if (__builtin_mul_overflow(storage->numel, unit, &tensor.storage_bytes)) return std::nullopt;
  if (!LiesInStorage(tensor)) return std::nullopt;
  return tensor;
}

// ("storage", class, key, location, numel); on load a location means "where it was", and we always
// read to the CPU.
std::optional<Storage> PersistentStorage(const Value& id) {
  const auto* tuple = As<Tuple>(id);
  if (tuple == nullptr || tuple->size() != 5) return std::nullopt;
  const auto* tag = As<std::string>((*tuple)[0]);
  const auto* type = As<Global>((*tuple)[1]);
  const auto* key = As<std::string>((*tuple)[2]);
  const auto* location = As<std::string>((*tuple)[3]);
  const auto* numel = As<int64_t>((*tuple)[4]);
  if (!tag || *tag != "storage" || !type || !key || !location || !numel || *numel < 0)
    return std::nullopt;
  return Storage{type->name, *key, *numel};
}

// ---- the machine

// Every step answers false at the first thing that a plain tensor's pickle has not.
class TensorPickleReader {
 public:
  explicit TensorPickleReader(std::span<const std::byte> pickle)
      : tokens_(pickle, "", pickle::Opcodes::kAll) {}

  std::optional<TensorDescription> Run() {
    const Token protocol = tokens_.Next();
    if (protocol.op != Op::kProto || protocol.number != 2) return std::nullopt;
    for (Token token = tokens_.Next(); token.op != Op::kStop; token = tokens_.Next()) {
      if (!Step(token)) return std::nullopt;
    }
    if (stack_.size() != 1 || tokens_.remaining() != 0) return std::nullopt;
    const auto* tensor = As<TensorDescription>(stack_[0]);
    return tensor == nullptr ? std::nullopt : std::optional(*tensor);
  }

 private:
  bool Step(const Token& token) {
    switch (token.op) {
      case Op::kBinInt1:
      case Op::kBinInt2:
      case Op::kBinInt:
      case Op::kLong1:
        return PushInteger(token);
      case Op::kEmptyTuple:
      case Op::kTuple1:
      case Op::kTuple2:
      case Op::kTuple3:
      case Op::kTuple:
        return MakeTuple(token.op);
      case Op::kMark:
        return Push(Mark{});
      case Op::kNewTrue:
      case Op::kNewFalse:
        return Push(token.op == Op::kNewTrue);
      case Op::kBinUnicode:
        return token.text.size() <= kMaxText && Push(std::string(token.text));
      case Op::kGlobal:
        return PushGlobal(token);
      case Op::kBinPut:
        return Remember(token.number);
      case Op::kBinGet:
        return Recall(token.number);
      case Op::kBinPersId:
        return Persistent();
      case Op::kReduce:
        return Reduce();
      default:
        return false;
    }
  }

  template <typename T>
  bool Push(T&& value) {
    stack_.push_back(Value{std::forward<T>(value)});
    return stack_.size() < kMaxStack;
  }
  bool PushInteger(const Token& token) {
    if (token.op == Op::kBinInt) return Push(int64_t{static_cast<int32_t>(token.number)});
    if (token.op != Op::kLong1) return Push(static_cast<int64_t>(token.number));
    if (token.text.empty() || token.text.size() > 8) return false;
    const int64_t value = pickle::LittleEndianInteger(token.text);
    return value >= 0 && Push(value);
  }
  bool PushGlobal(const Token& token) {
    if (token.text.size() + 1 + token.second_line.size() > kMaxText) return false;
    return Push(Global{std::string(token.text) + " " + std::string(token.second_line)});
  }

  bool MakeTuple(Op op) {
    switch (op) {
      case Op::kEmptyTuple:
        return Push(Tuple{});
      case Op::kTuple1:
        return MakeTupleOf(1);
      case Op::kTuple2:
        return MakeTupleOf(2);
      case Op::kTuple3:
        return MakeTupleOf(3);
      default:
        return MakeMarkedTuple();
    }
  }
  bool MakeTupleOf(size_t size) {
    if (stack_.size() < size) return false;
    Tuple tuple(std::make_move_iterator(stack_.end() - static_cast<std::ptrdiff_t>(size)),
                std::make_move_iterator(stack_.end()));
    stack_.resize(stack_.size() - size);
    return std::all_of(tuple.begin(), tuple.end(), MayBeItem) && Push(std::move(tuple));
  }
  bool MakeMarkedTuple() {
    const auto is_mark = [](const Value& value) { return As<Mark>(value) != nullptr; };
    const auto mark = std::find_if(stack_.rbegin(), stack_.rend(), is_mark);
    if (mark == stack_.rend()) return false;
    if (!MakeTupleOf(static_cast<size_t>(mark - stack_.rbegin()))) return false;
    stack_.erase(stack_.end() - 2);
    return true;
  }
  // A tensor's arguments hold tuples of numbers and nothing deeper, which bounds the depth of a
  // value's destruction.
  static bool MayBeItem(const Value& value) {
    if (As<Mark>(value) != nullptr) return false;
    const auto* tuple = As<Tuple>(value);
    return tuple == nullptr || std::none_of(tuple->begin(), tuple->end(), [](const Value& item) {
             return As<Tuple>(item) != nullptr;
           });
  }

  bool Remember(uint64_t index) {
    if (stack_.empty()) return false;
    // Tuples are put and never recalled in a tensor's pickle; recalling would let a few bytes
    // double a value many times.
    memo_.erase(index);
    if (As<Tuple>(stack_.back()) == nullptr) memo_.emplace(index, stack_.back());
    return true;
  }
  bool Recall(uint64_t index) {
    const auto found = memo_.find(index);
    return found != memo_.end() && Push(Value(found->second).v);
  }

  Value Pop() {
    Value value = std::move(stack_.back());
    stack_.pop_back();
    return value;
  }
  bool Persistent() {
    if (stack_.empty()) return false;
    std::optional<Storage> storage = PersistentStorage(Pop());
    return storage && Push(*std::move(storage));
  }
  bool Reduce() {
    if (stack_.size() < 2) return false;
    const Value args = Pop();
    const Value callee = Pop();
    const auto* function = As<Global>(callee);
    const auto* tuple = As<Tuple>(args);
    if (function == nullptr || tuple == nullptr) return false;
    if (function->name == "collections OrderedDict" && tuple->empty()) return Push(OrderedDict{});
    auto tensor = Rebuild(function->name, *tuple);
    return tensor && Push(std::move(*tensor));
  }

  pickle::Tokenizer tokens_;
  std::vector<Value> stack_;
  std::map<uint64_t, Value> memo_;
};

}  // namespace

std::optional<TensorDescription> DecodeTensorPickle(std::span<const std::byte> pickle) {
  if (pickle.size() > kMaxPickle) return std::nullopt;
  try {
    return TensorPickleReader(pickle).Run();
  } catch (const base::CorruptionError&) {
    // No opcode, or it ends too early: not the pickle of a plain tensor. Torch will say what is
    // wrong with it.
    return std::nullopt;
  }
}

}  // namespace hsdp_ckpt::format
