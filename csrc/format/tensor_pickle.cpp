#include "format/tensor_pickle.h"

#include <algorithm>
#include <map>
#include <variant>

#include "base/bytes.h"

namespace hsdp_ckpt::format {
namespace {

// Opcodes of pickle protocol 2; the names are those of CPython's pickletools.
enum Op : uint8_t {
  kMark = '(',
  kStop = '.',
  kBinInt = 'J',
  kBinInt1 = 'K',
  kBinInt2 = 'M',
  kBinPersId = 'Q',
  kReduce = 'R',
  kBinUnicode = 'X',
  kGlobal = 'c',
  kBinGet = 'h',
  kBinPut = 'q',
  kTuple = 't',
  kEmptyTuple = ')',
  kProto = 0x80,
  kTuple1 = 0x85,
  kTuple2 = 0x86,
  kTuple3 = 0x87,
  kNewTrue = 0x88,
  kNewFalse = 0x89,
  kLong1 = 0x8a,
};

class PickleWriter {
 public:
  void Operation(uint8_t op) { out_.Put(op); }
  // Every object that could be shared is remembered, as CPython's pickler does; the numbers count
  // up.
  void Memoize() {
    Operation(kBinPut);
    out_.Put(memo_++);
  }
  void Global(std::string_view module, std::string_view name) {
    Operation(kGlobal);
    out_.Put(module);
    out_.Put(std::string_view("\n"));
    out_.Put(name);
    out_.Put(std::string_view("\n"));
    Memoize();
  }
  void Text(std::string_view text) {
    Operation(kBinUnicode);
    out_.Put(static_cast<uint32_t>(text.size()));
    out_.Put(text);
    Memoize();
  }
  void Int(int64_t value) {
    if (value < 0x100) {
      Operation(kBinInt1);
      out_.Put(static_cast<uint8_t>(value));
    } else if (value < 0x10000) {
      Operation(kBinInt2);
      out_.Put(static_cast<uint16_t>(value));
    } else if (value <= INT32_MAX) {
      Operation(kBinInt);
      out_.Put(static_cast<uint32_t>(value));
    } else {
      // As few bytes as two's complement needs with the sign bit clear.
      uint8_t size = 1;
      while (size < 8 && (value >> (8 * size - 1)) != 0) ++size;
      Operation(kLong1);
      out_.Put(size);
      for (uint8_t i = 0; i < size; ++i) out_.Put(static_cast<uint8_t>(value >> (8 * i)));
    }
  }
  void Tuple(std::span<const int64_t> values) {
    if (values.empty()) return Operation(kEmptyTuple);
    if (values.size() > 3) Operation(kMark);
    for (const int64_t value : values) Int(value);
    Operation(values.size() > 3 ? uint8_t{kTuple}
                                : static_cast<uint8_t>(kTuple1 + values.size() - 1));
    Memoize();
  }
  std::vector<std::byte> Take() { return out_.Take(); }

 private:
  base::ByteWriter out_;
  uint8_t memo_ = 0;
};

// What the decoder's stack can hold. An object is what a reduce or a persistent id gave.
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
// Names of classes, "storage", "0", "cuda:7". Few bytes recall a text from the memo, so long ones
// would add up.
constexpr size_t kMaxText = 256;

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

// torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks), v3 with the
// dtype at the end.
std::optional<TensorDescription> Rebuild(const std::string& function, const Tuple& args) {
  const bool v3 = function == "torch._utils _rebuild_tensor_v3";
  if (!v3 && function != "torch._utils _rebuild_tensor_v2") return std::nullopt;
  if (args.size() != (v3 ? 7u : 6u)) return std::nullopt;
  const auto* storage = As<Storage>(args[0]);
  const auto* offset = As<int64_t>(args[1]);
  const auto shape = Integers(args[2]);
  const auto stride = Integers(args[3]);
  const auto* hooks = As<OrderedDict>(args[5]);
  if (!storage || !offset || *offset < 0 || !shape || !stride || !hooks ||
      As<bool>(args[4]) == nullptr)
    return std::nullopt;
  if (shape->size() != stride->size() || storage->key != "0") return std::nullopt;

  TensorDescription tensor;
  constexpr std::string_view kTorch = "torch ";
  if (v3) {
    const auto* dtype = As<Global>(args[6]);
    if (!dtype || !dtype->name.starts_with(kTorch) ||
        storage->type != "torch.storage UntypedStorage")
      return std::nullopt;
    tensor.dtype = FindDType(std::string_view(dtype->name).substr(kTorch.size()));
  } else if (storage->type.starts_with(kTorch)) {
    tensor.dtype = FindDTypeOfStorage(std::string_view(storage->type).substr(kTorch.size()));
  }
  if (tensor.dtype == nullptr) return std::nullopt;
  const int64_t unit = v3 ? 1 : tensor.dtype->size;
  if (__builtin_mul_overflow(storage->numel, unit, &tensor.storage_bytes)) return std::nullopt;

  // The last element that is addressed lies within the storage.
  int64_t last = *offset;
  bool empty = false;
  for (size_t i = 0; i < shape->size(); ++i) {
    int64_t reach;
    if ((*shape)[i] == 0)
      empty = true;
    else if (__builtin_mul_overflow((*shape)[i] - 1, (*stride)[i], &reach) ||
             __builtin_add_overflow(last, reach, &last))
      return std::nullopt;
  }
  if (!empty && last >= tensor.storage_bytes / tensor.dtype->size) return std::nullopt;
  tensor.shape = *shape;
  tensor.stride = *stride;
  tensor.storage_offset = *offset;
  return tensor;
}

class PickleReader {
 public:
  explicit PickleReader(std::span<const std::byte> pickle) : in_(pickle, "", "data.pkl") {}

  // Nullopt at the first thing that a plain tensor's pickle has not.
  std::optional<TensorDescription> Run() {
    if (in_.remaining() < 2 || in_.Get<uint8_t>() != kProto || in_.Get<uint8_t>() != 2)
      return std::nullopt;
    for (;;) {
      const auto op = in_.Get<uint8_t>();
      if (op == kStop) break;
      if (!Step(op)) return std::nullopt;
    }
    if (stack_.size() != 1 || in_.remaining() != 0) return std::nullopt;
    const auto* tensor = As<TensorDescription>(stack_[0]);
    return tensor == nullptr ? std::nullopt : std::optional(*tensor);
  }

 private:
  bool Step(uint8_t op) {
    switch (op) {
      case kMark:
        return Push(Mark{});
      case kBinInt1:
        return Push(int64_t{in_.Get<uint8_t>()});
      case kBinInt2:
        return Push(int64_t{in_.Get<uint16_t>()});
      case kBinInt:
        return Push(int64_t{static_cast<int32_t>(in_.Get<uint32_t>())});
      case kLong1:
        return Long();
      case kNewTrue:
        return Push(true);
      case kNewFalse:
        return Push(false);
      case kBinUnicode:
        return PushText();
      case kGlobal:
        return PushGlobal();
      case kEmptyTuple:
        return Push(Tuple{});
      case kTuple1:
        return MakeTuple(1);
      case kTuple2:
        return MakeTuple(2);
      case kTuple3:
        return MakeTuple(3);
      case kTuple:
        return MakeMarkedTuple();
      case kBinPut:
        return Remember();
      case kBinGet:
        return Recall();
      case kBinPersId:
        return Persistent();
      case kReduce:
        return Reduce();
      default:
        return false;
    }
  }

  template <typename T>
  bool Push(T&& value) {
    stack_.push_back(Value{std::forward<T>(value)});
    return stack_.size() < 1000;
  }
  bool Long() {
    const auto raw = in_.Get(in_.Get<uint8_t>());
    if (raw.size() > 8 || raw.empty() || (raw.back() & std::byte{0x80}) != std::byte{0})
      return false;
    int64_t value = 0;
    for (size_t i = raw.size(); i-- > 0;) value = value << 8 | static_cast<int64_t>(raw[i]);
    return Push(value);
  }
  bool PushText() {
    const auto size = in_.Get<uint32_t>();
    return size <= kMaxText && Push(std::string(in_.GetText(size)));
  }
  bool PushGlobal() {
    std::string name;
    for (const char separator : {' ', '\0'}) {
      for (char c = Char(); c != '\n'; c = Char()) name.push_back(c);
      if (name.size() > kMaxText) return false;
      if (separator != '\0') name.push_back(separator);
    }
    return Push(Global{std::move(name)});
  }
  char Char() { return static_cast<char>(in_.Get<uint8_t>()); }
  bool MakeTuple(size_t size) {
    if (stack_.size() < size) return false;
    Tuple tuple(std::make_move_iterator(stack_.end() - static_cast<std::ptrdiff_t>(size)),
                std::make_move_iterator(stack_.end()));
    stack_.resize(stack_.size() - size);
    // A tensor's arguments hold tuples of numbers and nothing deeper, which bounds the depth of a
    // value's destruction.
    const auto has_tuple = [](const Tuple& t) {
      return std::any_of(t.begin(), t.end(),
                         [](const Value& v) { return As<Tuple>(v) != nullptr; });
    };
    return std::none_of(tuple.begin(), tuple.end(),
                        [&](const Value& v) {
                          const auto* inner = As<Tuple>(v);
                          return As<Mark>(v) != nullptr || (inner != nullptr && has_tuple(*inner));
                        }) &&
           Push(std::move(tuple));
  }
  bool MakeMarkedTuple() {
    size_t size = 0;
    while (size < stack_.size() && As<Mark>(stack_[stack_.size() - 1 - size]) == nullptr) ++size;
    if (size == stack_.size()) return false;
    if (!MakeTuple(size)) return false;
    stack_.erase(stack_.end() - 2);
    return true;
  }
  bool Remember() {
    if (stack_.empty()) return false;
    // Tuples are put and never recalled in a tensor's pickle; recalling would let a few bytes
    // double a value many times.
    const auto index = in_.Get<uint8_t>();
    memo_.erase(index);
    if (As<Tuple>(stack_.back()) == nullptr) memo_.emplace(index, stack_.back());
    return true;
  }
  bool Recall() {
    const auto found = memo_.find(in_.Get<uint8_t>());
    return found != memo_.end() && Push(Value(found->second).v);
  }
  // ("storage", class, key, location, numel); on load a location means "where it was", and we
  // always read to the CPU.
  bool Persistent() {
    if (stack_.empty()) return false;
    const Value id = std::move(stack_.back());
    stack_.pop_back();
    const auto* tuple = As<Tuple>(id);
    if (tuple == nullptr || tuple->size() != 5) return false;
    const auto* tag = As<std::string>((*tuple)[0]);
    const auto* type = As<Global>((*tuple)[1]);
    const auto* key = As<std::string>((*tuple)[2]);
    const auto* numel = As<int64_t>((*tuple)[4]);
    if (!tag || *tag != "storage" || !type || !key || !As<std::string>((*tuple)[3]) || !numel ||
        *numel < 0)
      return false;
    return Push(Storage{type->name, *key, *numel});
  }
  bool Reduce() {
    if (stack_.size() < 2) return false;
    const Value args = std::move(stack_.back());
    stack_.pop_back();
    const Value callee = std::move(stack_.back());
    stack_.pop_back();
    const auto* function = As<Global>(callee);
    const auto* tuple = As<Tuple>(args);
    if (function == nullptr || tuple == nullptr) return false;
    if (function->name == "collections OrderedDict" && tuple->empty()) return Push(OrderedDict{});
    auto tensor = Rebuild(function->name, *tuple);
    return tensor && Push(std::move(*tensor));
  }

  base::ByteReader in_;
  std::vector<Value> stack_;
  std::map<uint8_t, Value> memo_;
};

}  // namespace

int64_t TensorBytes(const DType& dtype, std::span<const int64_t> shape) {
  int64_t bytes = dtype.size;
  bool empty = false;
  for (const int64_t size : shape) {
    if (size < 0) throw base::Error("a tensor's size can't be negative: " + std::to_string(size));
    if (size == 0) empty = true;
    // Strides are products in which an empty dimension counts as one; they have to fit as well.
    if (__builtin_mul_overflow(bytes, std::max<int64_t>(size, 1), &bytes))
      throw base::Error("a tensor of more than 2**63 bytes");
  }
  return empty ? 0 : bytes;
}

TensorDescription ContiguousTensor(const DType& dtype, std::span<const int64_t> shape) {
  TensorDescription tensor{&dtype,
                           {shape.begin(), shape.end()},
                           std::vector<int64_t>(shape.size()),
                           0,
                           TensorBytes(dtype, shape)};
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    tensor.stride[i] = stride;
    stride *= std::max<int64_t>(shape[i], 1);
  }
  return tensor;
}

std::vector<std::byte> EncodeTensorPickle(const TensorDescription& tensor) {
  const DType& dtype = *tensor.dtype;
  const bool v3 = dtype.storage.empty();
  PickleWriter out;
  out.Operation(kProto);
  out.Operation(2);
  out.Global("torch._utils", v3 ? "_rebuild_tensor_v3" : "_rebuild_tensor_v2");
  out.Operation(kMark);
  out.Operation(kMark);
  out.Text("storage");
  v3 ? out.Global("torch.storage", "UntypedStorage") : out.Global("torch", dtype.storage);
  out.Text("0");
  out.Text("cpu");
  out.Int(v3 ? tensor.storage_bytes : tensor.storage_bytes / dtype.size);
  out.Operation(kTuple);
  out.Memoize();
  out.Operation(kBinPersId);
  out.Int(tensor.storage_offset);
  out.Tuple(tensor.shape);
  out.Tuple(tensor.stride);
  out.Operation(kNewFalse);  // requires_grad
  out.Global("collections", "OrderedDict");
  out.Operation(kEmptyTuple);
  out.Operation(kReduce);
  out.Memoize();
  if (v3) out.Global("torch", dtype.name);
  out.Operation(kTuple);
  out.Memoize();
  out.Operation(kReduce);
  out.Memoize();
  out.Operation(kStop);
  return out.Take();
}

std::optional<TensorDescription> DecodeTensorPickle(std::span<const std::byte> pickle) {
  if (pickle.size() > kMaxPickle) return std::nullopt;
  try {
    return PickleReader(pickle).Run();
  } catch (const base::CorruptionError&) {
    return std::nullopt;  // ends too early: not the pickle of a plain tensor; torch will say what
                          // is wrong with it
  }
}

}  // namespace hsdp_ckpt::format
