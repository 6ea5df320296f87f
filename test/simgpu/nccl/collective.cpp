#include "simgpu/nccl/collective.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <type_traits>

namespace simgpu {
namespace {

template <typename T>
constexpr bool kIsHalf = std::is_same_v<T, c10::Half> || std::is_same_v<T, c10::BFloat16>;

template <typename T>
T Combine(T a, T b, Reduction reduction) {
  using Wide = std::conditional_t<kIsHalf<T>, float, T>;
  const auto x = static_cast<Wide>(a), y = static_cast<Wide>(b);
  switch (reduction) {
    case Reduction::kProduct:
      return static_cast<T>(x * y);
    case Reduction::kMax:
      return static_cast<T>(std::max(x, y));
    case Reduction::kMin:
      return static_cast<T>(std::min(x, y));
    default:
      return static_cast<T>(x + y);
  }
}

template <typename T>
T Scaled(T value, double factor) {
  if (factor == 1) return value;
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  return static_cast<T>(static_cast<Wide>(value) * static_cast<Wide>(factor));
}

template <typename T>
void ReduceAs(Reduction reduction, const std::vector<const char*>& inputs,
              const std::vector<double>& factors, size_t first, size_t count, int owner,
              char* out) {
  const size_t ranks = inputs.size();
  const auto value = [&](size_t rank, size_t i) {
    T element;
    std::memcpy(&element, inputs[rank] + (first + i) * sizeof(T), sizeof(T));
    return Scaled(element, factors[rank]);
  };
  for (size_t i = 0; i < count; ++i) {
    const size_t start = (static_cast<size_t>(owner) + 1) % ranks;
    T sum = value(start, i);
    for (size_t hop = 1; hop < ranks; ++hop) {
      sum = Combine(sum, value((start + hop) % ranks, i), reduction);
    }
    std::memcpy(out + i * sizeof(T), &sum, sizeof(T));
  }
}

/// Each rank's piece of what all have, as the ring of an all-reduce cuts it.
void AllReduce(const Call& call, const std::vector<const char*>& inputs,
               const std::vector<double>& factors, char* out) {
  const size_t piece = (call.count + inputs.size() - 1) / inputs.size();
  for (size_t owner = 0; owner < inputs.size(); ++owner) {
    const size_t first = std::min(call.count, piece * owner);
    const size_t last = std::min(call.count, first + piece);
    Reduce(call.type, call.reduction, inputs, factors, first, last - first, static_cast<int>(owner),
           out + first * SizeOf(call.type));
  }
}

}  // namespace

const char* NameOf(Collective kind) {
  constexpr const char* kNames[] = {"AllGather", "ReduceScatter", "AllReduce", "Broadcast",
                                    "Reduce",    "AllToAll",      "Send",      "Receive"};
  return kNames[static_cast<size_t>(kind)];
}

const char* NameOf(DataType type) {
  constexpr const char* kNames[] = {"int8",    "uint8",    "int32",       "uint32",
                                    "int64",   "uint64",   "float16",     "float32",
                                    "float64", "bfloat16", "float8_e4m3", "float8_e5m2"};
  return kNames[static_cast<size_t>(type)];
}

size_t SizeOf(DataType type) {
  switch (type) {
    case DataType::kInt8:
    case DataType::kUint8:
    case DataType::kFloat8e4m3:
    case DataType::kFloat8e5m2:
      return 1;
    case DataType::kFloat16:
    case DataType::kBfloat16:
      return 2;
    case DataType::kInt64:
    case DataType::kUint64:
    case DataType::kFloat64:
      return 8;
    default:
      return 4;
  }
}

bool IsPointToPoint(const Call& call) {
  return call.kind == Collective::kSend || call.kind == Collective::kReceive;
}

size_t SentBytes(const Call& call, int rank, int size) {
  const size_t piece = call.count * SizeOf(call.type);
  switch (call.kind) {
    case Collective::kReduceScatter:
    case Collective::kAllToAll:
      return piece * static_cast<size_t>(size);
    case Collective::kBroadcast:
      return rank == call.peer ? piece : 0;
    case Collective::kReceive:
      return 0;
    default:
      return piece;
  }
}

size_t ReceivedBytes(const Call& call, int rank, int size) {
  const size_t piece = call.count * SizeOf(call.type);
  switch (call.kind) {
    case Collective::kAllGather:
    case Collective::kAllToAll:
      return piece * static_cast<size_t>(size);
    case Collective::kReduce:
      return rank == call.peer ? piece : 0;
    case Collective::kSend:
      return 0;
    default:
      return piece;
  }
}

void Reduce(DataType type, Reduction reduction, const std::vector<const char*>& inputs,
            const std::vector<double>& factors, size_t first, size_t count, int owner, char* out) {
  const auto as = [&](auto element) {
    ReduceAs<decltype(element)>(reduction, inputs, factors, first, count, owner, out);
  };
  switch (type) {
    case DataType::kInt8:
      return as(int8_t{});
    case DataType::kUint8:
      return as(uint8_t{});
    case DataType::kInt32:
      return as(int32_t{});
    case DataType::kUint32:
      return as(uint32_t{});
    case DataType::kInt64:
      return as(int64_t{});
    case DataType::kUint64:
      return as(uint64_t{});
    case DataType::kFloat16:
      return as(c10::Half{});
    case DataType::kFloat32:
      return as(float{});
    case DataType::kFloat64:
      return as(double{});
    case DataType::kBfloat16:
      return as(c10::BFloat16{});
    default:
      throw std::invalid_argument("simgpu: no reductions in eight bits");
  }
}

void Compute(const Call& call, const std::vector<const char*>& inputs,
             const std::vector<double>& factors, int rank, char* out) {
  const size_t piece = call.count * SizeOf(call.type);
  const auto me = static_cast<size_t>(rank);
  switch (call.kind) {
    case Collective::kAllGather:
      for (size_t r = 0; r < inputs.size(); ++r) std::copy_n(inputs[r], piece, out + piece * r);
      return;
    case Collective::kAllToAll:
      for (size_t r = 0; r < inputs.size(); ++r) {
        std::copy_n(inputs[r] + piece * me, piece, out + piece * r);
      }
      return;
    case Collective::kReduceScatter:
      return Reduce(call.type, call.reduction, inputs, factors, call.count * me, call.count, rank,
                    out);
    case Collective::kReduce:
      if (rank != call.peer) return;
      return Reduce(call.type, call.reduction, inputs, factors, 0, call.count, rank, out);
    case Collective::kAllReduce:
      return AllReduce(call, inputs, factors, out);
    case Collective::kBroadcast:
      std::copy_n(inputs[static_cast<size_t>(call.peer)], piece, out);
      return;
    case Collective::kSend:
    case Collective::kReceive:
      return;  // between two, not among all
  }
}

}  // namespace simgpu
