// Devices and errors.
#include <cstdio>
#include <cstring>

#include "simgpu/core/settings.h"
#include "simgpu/cuda/api.h"

using simgpu::Fail;
using simgpu::Settings;

namespace {

constexpr int kVersion = CUDART_VERSION;

bool IsDevice(int device) { return device >= 0 && device < Settings::Get().devices; }

/// What torch and the kernels' launches ask for, in an H200's numbers.
cudaDeviceProp Properties(int device) {
  cudaDeviceProp p{};
  std::snprintf(p.name, sizeof p.name, "Simulated GPU");
  p.totalGlobalMem = Settings::Get().device_bytes;
  p.sharedMemPerBlock = 49152;
  p.sharedMemPerBlockOptin = 232448;
  p.sharedMemPerMultiprocessor = 233472;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536;
  p.warpSize = 32;
  p.maxThreadsPerBlock = 1024;
  p.maxThreadsPerMultiProcessor = 2048;
  p.maxBlocksPerMultiProcessor = 32;
  p.maxThreadsDim[0] = p.maxThreadsDim[1] = 1024;
  p.maxThreadsDim[2] = 64;
  p.maxGridSize[0] = 2147483647;
  p.maxGridSize[1] = p.maxGridSize[2] = 65535;
  p.major = 9;
  p.minor = 0;
  p.multiProcessorCount = 132;
  p.l2CacheSize = 50 << 20;
  p.unifiedAddressing = p.concurrentKernels = p.canMapHostMemory = 1;
  p.asyncEngineCount = 3;
  p.pciBusID = device + 1;
  p.memoryBusWidth = 5120;
  return p;
}

}  // namespace

SIMGPU_API cudaError_t cudaGetDeviceCount(int* count) {
  *count = Settings::Get().devices;  // asks no engine: a process may fork after it
  return cudaSuccess;
}

SIMGPU_API cudaError_t cudaGetDevice(int* device) {
  *device = simgpu::CurrentDevice();
  return cudaSuccess;
}

SIMGPU_API cudaError_t cudaSetDevice(int device) {
  if (!IsDevice(device)) return Fail(cudaErrorInvalidDevice);
  simgpu::SetCurrentDevice(device);
  return simgpu::Usable();
}

SIMGPU_API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (!IsDevice(device)) return Fail(cudaErrorInvalidDevice);
  *properties = Properties(device);
  return cudaSuccess;
}

SIMGPU_API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (!IsDevice(device)) return Fail(cudaErrorInvalidDevice);
  const cudaDeviceProp p = Properties(device);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = p.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = p.minor;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = p.multiProcessorCount;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = p.maxThreadsPerBlock;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = p.warpSize;
      return cudaSuccess;
    default:
      *value = 0;  // what is optional is not there
      return cudaSuccess;
  }
}

SIMGPU_API cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
  std::snprintf(text, static_cast<size_t>(length), "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}

SIMGPU_API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least != nullptr) *least = 0;
  if (greatest != nullptr) *greatest = -5;
  return cudaSuccess;
}

SIMGPU_API cudaError_t cudaDeviceSynchronize() {
  simgpu::Engine::Get().SynchronizeDevice(simgpu::CurrentDevice());
  return simgpu::Usable();
}

SIMGPU_API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 1;
  return cudaSuccess;
}

SIMGPU_API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }

SIMGPU_API cudaError_t cudaDriverGetVersion(int* version) {
  *version = kVersion;
  return cudaSuccess;
}

SIMGPU_API cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kVersion;
  return cudaSuccess;
}

SIMGPU_API cudaError_t cudaGetLastError() { return simgpu::TakeError(false); }
SIMGPU_API cudaError_t cudaPeekAtLastError() { return simgpu::TakeError(true); }

SIMGPU_API const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInitializationError:
      return "cudaErrorInitializationError";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorNotReady:
      return "cudaErrorNotReady";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    case cudaErrorInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case cudaErrorHostMemoryAlreadyRegistered:
      return "cudaErrorHostMemoryAlreadyRegistered";
    case cudaErrorHostMemoryNotRegistered:
      return "cudaErrorHostMemoryNotRegistered";
    case cudaErrorAssert:
      return "cudaErrorAssert";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    default:
      return "an error of the simulated GPU";
  }
}

SIMGPU_API const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInitializationError:
      return "initialization error";
    case cudaErrorAssert:
      return "device-side assert triggered";
    case cudaErrorNotSupported:
      return "operation not supported";
    default:
      return cudaGetErrorName(error);
  }
}

SIMGPU_API cudaError_t cudaProfilerStart() { return cudaSuccess; }
SIMGPU_API cudaError_t cudaProfilerStop() { return cudaSuccess; }
