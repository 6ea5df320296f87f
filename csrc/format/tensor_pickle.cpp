#include "format/tensor_pickle.h"

#include <algorithm>

#include "base/bytes.h"
#include "base/error.h"
#include "pickle/opcodes.h"

namespace hsdp_ckpt::format {
namespace {

using pickle::Op;

// Writes pickle protocol 2 as CPython's pickler does.
class TensorPickleWriter {
 public:
  void Put(Op op) { out_.Put(static_cast<uint8_t>(op)); }
  void Protocol(uint8_t version) {
    Put(Op::kProto);
    out_.Put(version);
  }
  // Every object that could be shared is remembered; the numbers count up.
  void Memoize() {
    Put(Op::kBinPut);
    out_.Put(memo_count_++);
  }
  void Global(std::string_view module, std::string_view name) {
    Put(Op::kGlobal);
    out_.Put(module);
    out_.Put(std::string_view("\n"));
    out_.Put(name);
    out_.Put(std::string_view("\n"));
    Memoize();
  }
  void Text(std::string_view text) {
    Put(Op::kBinUnicode);
    out_.Put(static_cast<uint32_t>(text.size()));
    out_.Put(text);
    Memoize();
  }
  void Int(int64_t value) {
    if (value < 0x100) {
      Put(Op::kBinInt1);
      out_.Put(static_cast<uint8_t>(value));
    } else if (value < 0x10000) {
      Put(Op::kBinInt2);
      out_.Put(static_cast<uint16_t>(value));
    } else if (value <= INT32_MAX) {
      Put(Op::kBinInt);
      out_.Put(static_cast<uint32_t>(value));
    } else {
      Long(value);
    }
  }
  void Tuple(std::span<const int64_t> values) {
    constexpr Op kShort[] = {Op::kEmptyTuple, Op::kTuple1, Op::kTuple2, Op::kTuple3};
    const bool is_short = values.size() < std::size(kShort);
    if (!is_short) Put(Op::kMark);
    for (const int64_t value : values) Int(value);
    Put(is_short ? kShort[values.size()] : Op::kTuple);
    if (!values.empty()) Memoize();  // there is only one empty tuple
  }
  std::vector<std::byte> Take() { return out_.Take(); }

 private:
  // As few bytes as two's complement needs with the sign bit clear.
  void Long(int64_t value) {
    uint8_t size = 1;
    while (size < 8 && (value >> (8 * size - 1)) != 0) ++size;
    Put(Op::kLong1);
    out_.Put(size);
    for (uint8_t i = 0; i < size; ++i) out_.Put(static_cast<uint8_t>(value >> (8 * i)));
  }

  base::ByteWriter out_;
  uint8_t memo_count_ = 0;
};

// ("storage", class, "0", "cpu", numel) and what makes a storage of it.
void PutStorage(TensorPickleWriter& out, const TensorDescription& tensor) {
  const RecordDtype& dtype = *tensor.dtype;
  const bool untyped = dtype.storage.empty();
  out.Put(Op::kMark);
  out.Text("storage");
  if (untyped) {
    out.Global("torch.storage", "UntypedStorage");
  } else {
    out.Global("torch", dtype.storage);
  }
  out.Text("0");
  out.Text("cpu");
  out.Int(untyped ? tensor.storage_bytes : tensor.storage_bytes / dtype.size);
  out.Put(Op::kTuple);
  out.Memoize();
  out.Put(Op::kBinPersId);
}

}  // namespace

int64_t TensorBytes(const RecordDtype& dtype, std::span<const int64_t> shape) {
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

TensorDescription ContiguousTensor(const RecordDtype& dtype, std::span<const int64_t> shape) {
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
  const RecordDtype& dtype = *tensor.dtype;
  const bool v3 = dtype.storage.empty();
  TensorPickleWriter out;
  out.Protocol(2);
  out.Global("torch._utils", v3 ? "_rebuild_tensor_v3" : "_rebuild_tensor_v2");
  out.Put(Op::kMark);
  PutStorage(out, tensor);
  out.Int(tensor.storage_offset);
  out.Tuple(tensor.shape);
  out.Tuple(tensor.stride);
  out.Put(Op::kNewFalse);  // requires_grad
  out.Global("collections", "OrderedDict");
  out.Put(Op::kEmptyTuple);
  out.Put(Op::kReduce);
  out.Memoize();
  if (v3) out.Global("torch", dtype.name);
  out.Put(Op::kTuple);
  out.Memoize();
  out.Put(Op::kReduce);
  out.Memoize();
  out.Put(Op::kStop);
  return out.Take();
}

}  // namespace hsdp_ckpt::format
