// Kernels: what compiled device code registers when it is loaded, and launches.
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "simgpu/core/findings.h"
#include "simgpu/cuda/api.h"
#include "simgpu/cuda/kernels.h"

using simgpu::Engine;
using simgpu::Fail;

namespace {

struct Kernels {
  std::mutex mutex;
  std::map<const void*, std::string> names;  // by the address of the host's stub
};
Kernels& TheKernels() {
  static auto& kernels = *new Kernels;  // libraries register theirs before main
  return kernels;
}

std::string NameOf(const void* stub) {
  const std::lock_guard lock(TheKernels().mutex);
  const auto at = TheKernels().names.find(stub);
  return at == TheKernels().names.end() ? "a kernel that was never registered" : at->second;
}

struct Configuration {
  dim3 grid, block;
  size_t shared = 0;
  void* stream = nullptr;
};
thread_local std::vector<Configuration> t_configurations;  // of launches that are being made

}  // namespace

SIMGPU_API void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
SIMGPU_API void __cudaRegisterFatBinaryEnd(void**) {}
SIMGPU_API void __cudaUnregisterFatBinary(void**) {}
SIMGPU_API char __cudaInitModule(void**) { return 1; }
SIMGPU_API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
SIMGPU_API void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int,
                                       uint3*, uint3*, dim3*, dim3*, int*) {
  const std::lock_guard lock(TheKernels().mutex);
  TheKernels().names[stub] = name;
}

SIMGPU_API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                                void* stream) {
  t_configurations.push_back({grid, block, shared, stream});
  return 0;
}
SIMGPU_API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared,
                                                  void* stream) {
  const Configuration last = t_configurations.back();
  t_configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *static_cast<void**>(stream) = last.stream;
  return cudaSuccess;
}

SIMGPU_API cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments,
                                        size_t, cudaStream_t stream) {
  if (const cudaError_t error = simgpu::Usable(); error != cudaSuccess) return error;
  const unsigned threads = block.x * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0 || threads > 1024) {
    return Fail(cudaErrorInvalidConfiguration);
  }
  const std::string name = NameOf(stub);
  // torch.cuda._sleep: how long something takes is the scheduler's to say.
  if (name.find("spin_kernel") != std::string::npos) return cudaSuccess;
  const simgpu::KernelCode code = simgpu::FindKernel(name);
  if (!code || grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1) {
    simgpu::UnknownCall(("kernel " + name).c_str());
    return Fail(cudaErrorInvalidDeviceFunction);
  }
  Engine::Get().Issue(simgpu::StreamOf(stream), code({grid.x, threads, arguments}));
  return cudaSuccess;
}

// CUDA 13's stubs launch by a handle, which here is the stub's address.
SIMGPU_API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}
SIMGPU_API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block,
                                          void** arguments, size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared,
                          stream);
}

/// One, as for a kernel that takes all registers: its few blocks have much to do each.
SIMGPU_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* stub,
                                                                     int threads, size_t) {
  if (const cudaError_t error = simgpu::Usable(); error != cudaSuccess) return error;
  if (threads <= 0 || threads > 1024) return Fail(cudaErrorInvalidValue);
  if (!simgpu::FindKernel(NameOf(stub))) return Fail(cudaErrorInvalidDeviceFunction);
  *blocks = 1;
  return cudaSuccess;
}

SIMGPU_API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  if (const cudaError_t error = simgpu::Usable(); error != cudaSuccess) return error;
  simgpu::Operation call;
  call.kind = simgpu::Kind::kHostFunction;
  call.name = "host function";
  call.run = [=] { function(data); };
  Engine::Get().Issue(simgpu::StreamOf(stream), std::move(call));
  return cudaSuccess;
}
