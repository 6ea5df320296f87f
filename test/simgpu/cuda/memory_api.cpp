// Memory and copies.
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "simgpu/core/findings.h"
#include "simgpu/cuda/api.h"

using simgpu::Engine;
using simgpu::Fail;
using simgpu::HostMemory;
using simgpu::Operation;

namespace {

bool IsOnDevice(const void* ptr) { return Engine::Get().DeviceOf(ptr) >= 0; }
bool IsPinned(const void* ptr) { return Engine::Get().host_memory().IsPinned(ptr); }

/// A copy between any two places. Memory of the host that is not pinned is read before this
/// returns, or written when the stream is waited for.
cudaError_t Copy(void* to, const void* from, size_t bytes, int stream, bool waits) {
  if (const cudaError_t error = simgpu::Usable(); error != cudaSuccess) return error;
  if (bytes == 0) return cudaSuccess;
  Engine& engine = Engine::Get();
  const bool to_device = IsOnDevice(to), from_device = IsOnDevice(from);
  const HostMemory& host = engine.host_memory();
  if (!host.AreTogether(to, bytes) || !host.AreTogether(from, bytes)) {
    return Fail(cudaErrorInvalidValue);
  }
  Operation copy;
  copy.kind = simgpu::Kind::kCopy;
  copy.name = std::string("memcpy ") + (from_device ? "device" : "host") + " to " +
              (to_device ? "device" : "host");
  const bool fills_pageable = !to_device && !IsPinned(to);
  if (!fills_pageable) copy.accesses.push_back(simgpu::Writes(to, bytes));
  if (from_device || IsPinned(from)) {
    copy.accesses.push_back(simgpu::Reads(from, bytes));
    copy.run = [=, &engine] { std::memmove(engine.Hands(to), engine.Hands(from), bytes); };
  } else {
    const auto* first = static_cast<const char*>(from);
    auto staged = std::make_shared<std::vector<char>>(first, first + bytes);
    copy.run = [=, &engine] { std::memcpy(engine.Hands(to), staged->data(), bytes); };
  }
  engine.Issue(stream, std::move(copy));
  if (waits || fills_pageable) engine.SynchronizeStream(stream);
  return simgpu::Usable();
}

int DefaultStream() { return Engine::Get().default_stream(simgpu::CurrentDevice()); }

void SynchronizeAll() {
  for (int d = 0; d < simgpu::Settings::Get().devices; ++d) Engine::Get().SynchronizeDevice(d);
}

}  // namespace

SIMGPU_API cudaError_t cudaMalloc(void** ptr, size_t bytes) {
  if (const cudaError_t error = simgpu::Usable(); error != cudaSuccess) return error;
  *ptr = Engine::Get().Allocate(simgpu::CurrentDevice(), bytes == 0 ? 1 : bytes);
  return *ptr != nullptr ? cudaSuccess : Fail(cudaErrorMemoryAllocation);
}

SIMGPU_API cudaError_t cudaFree(void* ptr) {
  if (ptr == nullptr) return simgpu::Usable();  // which is how programs make a context
  return Engine::Get().Free(ptr) ? cudaSuccess : Fail(cudaErrorInvalidValue);
}

SIMGPU_API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = simgpu::Settings::Get().device_bytes;
  *free = *total - Engine::Get().used(simgpu::CurrentDevice());
  return cudaSuccess;
}

SIMGPU_API cudaError_t cudaHostAlloc(void** ptr, size_t bytes, unsigned) {
  if (const cudaError_t error = simgpu::Usable(); error != cudaSuccess) return error;
  *ptr = Engine::Get().host_memory().Allocate(bytes);
  return *ptr != nullptr ? cudaSuccess : Fail(cudaErrorMemoryAllocation);
}
SIMGPU_API cudaError_t cudaMallocHost(void** ptr, size_t bytes) {
  return cudaHostAlloc(ptr, bytes, 0);
}

SIMGPU_API cudaError_t cudaFreeHost(void* ptr) {
  SynchronizeAll();
  return Engine::Get().host_memory().Free(ptr) ? cudaSuccess : Fail(cudaErrorInvalidValue);
}

SIMGPU_API cudaError_t cudaHostRegister(void* ptr, size_t bytes, unsigned) {
  if (const cudaError_t error = simgpu::Usable(); error != cudaSuccess) return error;
  if (IsPinned(ptr)) return Fail(cudaErrorHostMemoryAlreadyRegistered);
  const bool is_registered = Engine::Get().host_memory().Register(ptr, bytes);
  return is_registered ? cudaSuccess : Fail(cudaErrorMemoryAllocation);
}

SIMGPU_API cudaError_t cudaHostUnregister(void* ptr) {
  SynchronizeAll();
  const bool was_registered = Engine::Get().host_memory().Unregister(ptr);
  return was_registered ? cudaSuccess : Fail(cudaErrorHostMemoryNotRegistered);
}

SIMGPU_API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes,
                                                const void* ptr) {
  *attributes = {};
  const Engine* engine = Engine::IfMade();
  const int device = engine == nullptr ? -1 : engine->DeviceOf(ptr);
  auto* address = const_cast<void*>(ptr);
  if (device >= 0) {
    attributes->type = cudaMemoryTypeDevice;
    attributes->device = device;
    attributes->devicePointer = address;
  } else if (engine != nullptr && IsPinned(ptr)) {
    attributes->type = cudaMemoryTypeHost;
    attributes->device = simgpu::CurrentDevice();
    attributes->hostPointer = attributes->devicePointer = address;
  } else {
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->device = cudaInvalidDeviceId;
    attributes->hostPointer = address;
  }
  return cudaSuccess;
}

SIMGPU_API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return Copy(to, from, bytes, DefaultStream(), true);
}
SIMGPU_API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                       cudaStream_t stream) {
  return Copy(to, from, bytes, simgpu::StreamOf(stream), false);
}
SIMGPU_API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes,
                                           cudaStream_t stream) {
  return Copy(to, from, bytes, simgpu::StreamOf(stream), false);
}

SIMGPU_API cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  if (const cudaError_t error = simgpu::Usable(); error != cudaSuccess) return error;
  if (bytes == 0) return cudaSuccess;
  Operation set;
  set.kind = simgpu::Kind::kMemset;
  set.name = "memset";
  set.accesses = {simgpu::Writes(to, bytes)};
  set.run = [=] { std::memset(Engine::Get().Hands(to), value, bytes); };
  Engine::Get().Issue(simgpu::StreamOf(stream), std::move(set));
  return cudaSuccess;
}
SIMGPU_API cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  const cudaError_t error = cudaMemsetAsync(to, value, bytes, nullptr);
  if (error == cudaSuccess) Engine::Get().SynchronizeStream(DefaultStream());
  return error;
}
