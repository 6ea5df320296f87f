#include <unistd.h>

#include <cstdio>

#include "simgpu/core/findings.h"
#include "simgpu/cuda/api.h"

namespace simgpu {
namespace {

thread_local int t_device = 0;
thread_local cudaError_t t_error = cudaSuccess;

}  // namespace

int CurrentDevice() { return t_device; }
void SetCurrentDevice(int device) { t_device = device; }

cudaError_t Fail(cudaError_t error) { return t_error = error; }

cudaError_t TakeError(bool keeps) {
  const cudaError_t error = t_error;
  if (!keeps) t_error = cudaSuccess;
  return error;
}

cudaError_t Usable() {
  static const pid_t process = getpid();
  if (getpid() != process) return Fail(cudaErrorInitializationError);
  const std::string failure = Engine::Get().failure();
  if (failure.empty()) return cudaSuccess;
  static std::once_flag once;
  std::call_once(once, [&] { std::fprintf(stderr, "simgpu: %s\n", failure.c_str()); });
  return Fail(cudaErrorAssert);
}

int StreamOf(cudaStream_t stream) {
  // The legacy and the per-thread default streams are small numbers.
  if (reinterpret_cast<uintptr_t>(stream) <= 2) return Engine::Get().default_stream(t_device);
  return reinterpret_cast<StreamHandle*>(stream)->id;
}

int UnknownCall(const char* name) {
  Findings::Get().Add(Fault::kUnknownCall, name, std::string(name) + " is not simulated");
  return 0;
}

}  // namespace simgpu

// For the extension that puts kernels into ATen's dispatcher.
extern "C" __attribute__((visibility("default"))) int simgpu_stream(void* stream, int device) {
  if (reinterpret_cast<uintptr_t>(stream) <= 2) {
    return simgpu::Engine::Get().default_stream(device);
  }
  return static_cast<simgpu::StreamHandle*>(stream)->id;
}
