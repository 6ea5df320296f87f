#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <mutex>

#include "simgpu/core/engine.h"

// A function of the library that this one stands in for.
#define SIMGPU_API extern "C" __attribute__((visibility("default")))

namespace simgpu {

/// What cudaStream_t and cudaEvent_t point to.
struct StreamHandle {
  int id;
  int priority;
};
struct EventHandle {
  std::shared_ptr<Event> last() {
    const std::lock_guard lock(mutex);
    return event;
  }
  std::mutex mutex;
  std::shared_ptr<Event> event;  // its last recording
};

/// This thread's device.
int CurrentDevice();
void SetCurrentDevice(int device);

/// Remembers an error of this thread, and returns it.
cudaError_t Fail(cudaError_t error);
cudaError_t TakeError(bool keeps);
/// cudaSuccess, or why nothing can be done here any more: a fork of a process that has used the
/// devices, or a kernel that has failed.
cudaError_t Usable();

/// The engine's stream for a handle; default streams are those of the current device.
int StreamOf(cudaStream_t stream);
inline EventHandle& HandleOf(cudaEvent_t event) { return *reinterpret_cast<EventHandle*>(event); }

/// A call that is not simulated: reports it by name.
int UnknownCall(const char* name);

}  // namespace simgpu
