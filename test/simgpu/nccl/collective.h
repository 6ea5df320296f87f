#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace simgpu {

enum class Collective : uint8_t {
  kAllGather,
  kReduceScatter,
  kAllReduce,
  kBroadcast,
  kReduce,
  kAllToAll,
  kSend,
  kReceive
};
const char* NameOf(Collective kind);

enum class DataType : uint8_t {
  kInt8,
  kUint8,
  kInt32,
  kUint32,
  kInt64,
  kUint64,
  kFloat16,
  kFloat32,
  kFloat64,
  kBfloat16,
  kFloat8e4m3,
  kFloat8e5m2
};
size_t SizeOf(DataType type);
const char* NameOf(DataType type);

enum class Reduction : uint8_t { kSum, kProduct, kMax, kMin, kAverage, kScaledSum };

/// One call of one rank, counted as NCCL does: `count` elements of one rank's piece in all-gather,
/// reduce-scatter and all-to-all, of the whole in the others.
struct Call {
  Collective kind;
  const void* send = nullptr;
  void* receive = nullptr;
  size_t count = 0;
  DataType type = DataType::kFloat32;
  Reduction reduction = Reduction::kSum;
  double factor = 1;  ///< kScaledSum: each rank's own, by which it multiplies its input
  int peer = 0;       ///< of sends and receives; the root of broadcasts and reductions
};
bool IsPointToPoint(const Call& call);
size_t SentBytes(const Call& call, int rank, int size);
size_t ReceivedBytes(const Call& call, int rank, int size);

/// Elements [first, first + count) of the ranks' inputs as a ring sums them: piece `owner` sets out
/// from the rank behind its owner, and is rounded to the type at every hop. `factors`: of each
/// rank's input.
void Reduce(DataType type, Reduction reduction, const std::vector<const char*>& inputs,
            const std::vector<double>& factors, size_t first, size_t count, int owner, char* out);

/// What a call gives this rank, of the inputs of all ranks (as many bytes as each sends).
void Compute(const Call& call, const std::vector<const char*>& inputs,
             const std::vector<double>& factors, int rank, char* out);

}  // namespace simgpu
