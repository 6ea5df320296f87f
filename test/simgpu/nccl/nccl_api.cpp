// libnccl, as torch calls it.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "simgpu/cuda/api.h"
#include "simgpu/nccl/communicator.h"

using simgpu::Call;
using simgpu::Collective;
using simgpu::Communicator;
using simgpu::DataType;

namespace {

using Handle = std::shared_ptr<Communicator>;
const Handle& Of(ncclComm_t communicator) { return *reinterpret_cast<Handle*>(communicator); }
ncclComm_t HandleFor(Handle made) {
  return reinterpret_cast<ncclComm_t>(made ? new Handle(std::move(made)) : nullptr);
}

thread_local std::string t_last_error;
ncclResult_t Fail(ncclResult_t error, std::string why) {
  t_last_error = std::move(why);
  return error;
}
ncclResult_t NotSimulated(const std::string& what) {
  simgpu::UnknownCall(what.c_str());
  return Fail(ncclInvalidUsage, what + " is not simulated");
}

// ---- groups: calls between start and end are one operation for each communicator and stream

struct Pending {
  Handle communicator;
  int stream;
  std::vector<Call> calls;
};
thread_local int t_depth = 0;
thread_local std::vector<Pending> t_pending;

ncclResult_t Launch(ncclComm_t communicator, cudaStream_t stream, Call call) {
  const Handle& handle = Of(communicator);
  const int id = simgpu::StreamOf(stream);
  if (t_depth == 0) {
    handle->Launch(id, {call});
    return ncclSuccess;
  }
  for (Pending& pending : t_pending) {
    if (pending.communicator == handle && pending.stream == id) {
      pending.calls.push_back(call);
      return ncclSuccess;
    }
  }
  t_pending.push_back({handle, id, {call}});
  return ncclSuccess;
}

// ---- types and reductions

std::optional<DataType> TypeOf(ncclDataType_t type) {
  switch (type) {
    case ncclInt8:
      return DataType::kInt8;
    case ncclUint8:
      return DataType::kUint8;
    case ncclInt32:
      return DataType::kInt32;
    case ncclUint32:
      return DataType::kUint32;
    case ncclInt64:
      return DataType::kInt64;
    case ncclUint64:
      return DataType::kUint64;
    case ncclFloat16:
      return DataType::kFloat16;
    case ncclFloat32:
      return DataType::kFloat32;
    case ncclFloat64:
      return DataType::kFloat64;
    case ncclBfloat16:
      return DataType::kBfloat16;
    case ncclFloat8e4m3:
      return DataType::kFloat8e4m3;
    case ncclFloat8e5m2:
      return DataType::kFloat8e5m2;
    default:
      return std::nullopt;
  }
}

/// The factors of sums that multiply before they add, by the number that a program knows them by.
struct Factors {
  std::mutex mutex;
  std::map<int, double> of;
  int next = 1000;  // above NCCL's own reductions
};
Factors& TheFactors() {
  static auto& factors = *new Factors;
  return factors;
}

std::optional<double> Scalar(const void* from, ncclDataType_t type) {
  const auto read = [&](auto value) {
    std::memcpy(&value, from, sizeof value);
    return static_cast<double>(value);
  };
  switch (type) {
    case ncclFloat16:
      return read(c10::Half{});
    case ncclBfloat16:
      return read(c10::BFloat16{});
    case ncclFloat32:
      return read(float{});
    case ncclFloat64:
      return read(double{});
    default:
      return std::nullopt;
  }
}

bool SetReduction(Call& call, ncclRedOp_t reduction) {
  switch (reduction) {
    case ncclSum:
      call.reduction = simgpu::Reduction::kSum;
      return true;
    case ncclProd:
      call.reduction = simgpu::Reduction::kProduct;
      return true;
    case ncclMax:
      call.reduction = simgpu::Reduction::kMax;
      return true;
    case ncclMin:
      call.reduction = simgpu::Reduction::kMin;
      return true;
    case ncclAvg:
      call.reduction = simgpu::Reduction::kAverage;
      return true;
    default:
      break;
  }
  const std::lock_guard lock(TheFactors().mutex);
  const auto at = TheFactors().of.find(static_cast<int>(reduction));
  if (at == TheFactors().of.end()) return false;
  call.reduction = simgpu::Reduction::kScaledSum;
  call.factor = at->second;
  return true;
}

struct Arguments {
  Collective kind;
  const void* send;
  void* receive;
  size_t count;
  ncclDataType_t type;
  ncclComm_t communicator;
  cudaStream_t stream;
  int peer = 0;
  ncclRedOp_t reduction = ncclSum;
};

ncclResult_t Launch(const Arguments& a) {
  const std::optional<DataType> type = TypeOf(a.type);
  if (!type) return NotSimulated("NCCL's data type " + std::to_string(a.type));
  Call call{a.kind, a.send, a.receive, a.count, *type};
  call.peer = a.peer;
  if (!SetReduction(call, a.reduction)) {
    return Fail(ncclInvalidArgument, "no such reduction");
  }
  return Launch(a.communicator, a.stream, call);
}

ncclResult_t Opened(ncclComm_t* out, const std::string& id, int rank, int size) {
  try {
    *out = HandleFor(Communicator::Open(id, rank, size, simgpu::CurrentDevice()));
    return ncclSuccess;
  } catch (const std::exception& error) {
    return Fail(ncclSystemError, error.what());
  }
}

std::string Text(const ncclUniqueId& id) {
  return {id.internal, strnlen(id.internal, sizeof id.internal)};
}

}  // namespace

// ---- communicators
// -------------------------------------------------------------------------------

SIMGPU_API ncclResult_t ncclGetVersion(int* version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}

SIMGPU_API ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  std::memset(id, 0, sizeof *id);
  std::random_device random;
  std::snprintf(id->internal, sizeof id->internal, "%08x%08x", random(), random());
  return ncclSuccess;
}

SIMGPU_API ncclResult_t ncclCommInitRankConfig(ncclComm_t* out, int size, ncclUniqueId id, int rank,
                                               ncclConfig_t*) {
  return Opened(out, Text(id), rank, size);
}
SIMGPU_API ncclResult_t ncclCommInitRank(ncclComm_t* out, int size, ncclUniqueId id, int rank) {
  return Opened(out, Text(id), rank, size);
}
SIMGPU_API ncclResult_t ncclCommInitRankScalable(ncclComm_t* out, int size, int rank, int,
                                                 ncclUniqueId* ids, ncclConfig_t*) {
  return Opened(out, Text(ids[0]), rank, size);
}

SIMGPU_API ncclResult_t ncclCommSplit(ncclComm_t communicator, int color, int key, ncclComm_t* out,
                                      ncclConfig_t*) {
  try {
    *out = HandleFor(Of(communicator)->Split(color, key));
    return ncclSuccess;
  } catch (const std::exception& error) {
    return Fail(ncclSystemError, error.what());
  }
}

/// What is queued ends first, as without an abort it must.
SIMGPU_API ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclSuccess; }
SIMGPU_API ncclResult_t ncclCommDestroy(ncclComm_t communicator) {
  // Operations that are queued hold it.
  delete reinterpret_cast<Handle*>(communicator);
  return ncclSuccess;
}
SIMGPU_API ncclResult_t ncclCommAbort(ncclComm_t communicator) {
  Of(communicator)->Abort();
  return ncclCommDestroy(communicator);
}
SIMGPU_API ncclResult_t ncclCommGetAsyncError(ncclComm_t communicator, ncclResult_t* error) {
  const int lost = Of(communicator)->lost_rank();
  *error = lost < 0 ? ncclSuccess : ncclRemoteError;
  if (lost >= 0) t_last_error = "rank " + std::to_string(lost) + " is gone";
  return ncclSuccess;
}
SIMGPU_API ncclResult_t ncclCommCount(const ncclComm_t communicator, int* size) {
  *size = Of(communicator)->size();
  return ncclSuccess;
}
SIMGPU_API ncclResult_t ncclCommUserRank(const ncclComm_t communicator, int* rank) {
  *rank = Of(communicator)->rank();
  return ncclSuccess;
}
SIMGPU_API ncclResult_t ncclCommCuDevice(const ncclComm_t communicator, int* device) {
  *device = Of(communicator)->device();
  return ncclSuccess;
}
/// Buffers that are known beforehand are no faster here.
SIMGPU_API ncclResult_t ncclCommRegister(const ncclComm_t, void*, size_t, void** handle) {
  *handle = nullptr;
  return ncclSuccess;
}
SIMGPU_API ncclResult_t ncclCommDeregister(const ncclComm_t, void*) { return ncclSuccess; }

SIMGPU_API const char* ncclGetErrorString(ncclResult_t error) {
  switch (error) {
    case ncclSuccess:
      return "no error";
    case ncclSystemError:
      return "system error of the simulated NCCL";
    case ncclInvalidArgument:
      return "invalid argument";
    case ncclInvalidUsage:
      return "a call that is not simulated";
    case ncclRemoteError:
      return "a peer is gone";
    default:
      return "error of the simulated NCCL";
  }
}
SIMGPU_API const char* ncclGetLastError(ncclComm_t) { return t_last_error.c_str(); }

SIMGPU_API ncclResult_t ncclGroupStart() {
  ++t_depth;
  return ncclSuccess;
}
SIMGPU_API ncclResult_t ncclGroupEnd() {
  if (--t_depth > 0) return ncclSuccess;
  for (Pending& pending : std::exchange(t_pending, {})) {
    pending.communicator->Launch(pending.stream, std::move(pending.calls));
  }
  return ncclSuccess;
}

SIMGPU_API ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t* reduction, void* scalar,
                                                 ncclDataType_t type,
                                                 ncclScalarResidence_t residence, ncclComm_t) {
  if (residence != ncclScalarHostImmediate) return NotSimulated("a factor in device memory");
  const std::optional<double> factor = Scalar(scalar, type);
  if (!factor) return NotSimulated("a factor of NCCL's data type " + std::to_string(type));
  const std::lock_guard lock(TheFactors().mutex);
  TheFactors().of[TheFactors().next] = *factor;
  *reduction = static_cast<ncclRedOp_t>(TheFactors().next++);
  return ncclSuccess;
}
SIMGPU_API ncclResult_t ncclRedOpDestroy(ncclRedOp_t reduction, ncclComm_t) {
  const std::lock_guard lock(TheFactors().mutex);
  return TheFactors().of.erase(static_cast<int>(reduction)) == 1 ? ncclSuccess
                                                                 : ncclInvalidArgument;
}

// ---- collectives
// ---------------------------------------------------------------------------------

SIMGPU_API ncclResult_t ncclAllGather(const void* send, void* receive, size_t count,
                                      ncclDataType_t type, ncclComm_t of, cudaStream_t stream) {
  return Launch({Collective::kAllGather, send, receive, count, type, of, stream});
}
SIMGPU_API ncclResult_t ncclReduceScatter(const void* send, void* receive, size_t count,
                                          ncclDataType_t type, ncclRedOp_t reduction, ncclComm_t of,
                                          cudaStream_t stream) {
  return Launch({Collective::kReduceScatter, send, receive, count, type, of, stream, 0, reduction});
}
SIMGPU_API ncclResult_t ncclAllReduce(const void* send, void* receive, size_t count,
                                      ncclDataType_t type, ncclRedOp_t reduction, ncclComm_t of,
                                      cudaStream_t stream) {
  return Launch({Collective::kAllReduce, send, receive, count, type, of, stream, 0, reduction});
}
SIMGPU_API ncclResult_t ncclReduce(const void* send, void* receive, size_t count,
                                   ncclDataType_t type, ncclRedOp_t reduction, int root,
                                   ncclComm_t of, cudaStream_t stream) {
  return Launch({Collective::kReduce, send, receive, count, type, of, stream, root, reduction});
}
SIMGPU_API ncclResult_t ncclBroadcast(const void* send, void* receive, size_t count,
                                      ncclDataType_t type, int root, ncclComm_t of,
                                      cudaStream_t stream) {
  return Launch({Collective::kBroadcast, send, receive, count, type, of, stream, root});
}
SIMGPU_API ncclResult_t ncclBcast(void* data, size_t count, ncclDataType_t type, int root,
                                  ncclComm_t of, cudaStream_t stream) {
  return ncclBroadcast(data, data, count, type, root, of, stream);
}
SIMGPU_API ncclResult_t ncclAlltoAll(const void* send, void* receive, size_t count,
                                     ncclDataType_t type, ncclComm_t of, cudaStream_t stream) {
  return Launch({Collective::kAllToAll, send, receive, count, type, of, stream});
}
SIMGPU_API ncclResult_t ncclSend(const void* data, size_t count, ncclDataType_t type, int peer,
                                 ncclComm_t of, cudaStream_t stream) {
  return Launch({Collective::kSend, data, nullptr, count, type, of, stream, peer});
}
SIMGPU_API ncclResult_t ncclRecv(void* data, size_t count, ncclDataType_t type, int peer,
                                 ncclComm_t of, cudaStream_t stream) {
  return Launch({Collective::kReceive, nullptr, data, count, type, of, stream, peer});
}
