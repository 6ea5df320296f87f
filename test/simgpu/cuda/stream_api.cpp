// Streams and events.
#include "simgpu/cuda/api.h"

using simgpu::Engine;
using simgpu::EventHandle;
using simgpu::Fail;
using simgpu::StreamHandle;
using simgpu::StreamOf;

SIMGPU_API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int priority) {
  if (const cudaError_t error = simgpu::Usable(); error != cudaSuccess) return error;
  const int id = Engine::Get().CreateStream(simgpu::CurrentDevice());
  *stream = reinterpret_cast<cudaStream_t>(new StreamHandle{id, priority});
  return cudaSuccess;
}
SIMGPU_API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
SIMGPU_API cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
/// What is queued on it goes on; the handle stays, since torch may name it until the process ends.
SIMGPU_API cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

SIMGPU_API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  const bool is_default = reinterpret_cast<uintptr_t>(stream) <= 2;
  *priority = is_default ? 0 : reinterpret_cast<StreamHandle*>(stream)->priority;
  return cudaSuccess;
}
SIMGPU_API cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return Engine::Get().QueryStream(StreamOf(stream)) ? simgpu::Usable() : Fail(cudaErrorNotReady);
}
SIMGPU_API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  Engine::Get().SynchronizeStream(StreamOf(stream));
  return simgpu::Usable();
}
SIMGPU_API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  // An event that was never recorded is done.
  if (auto last = simgpu::HandleOf(event).last()) {
    Engine::Get().Wait(StreamOf(stream), std::move(last));
  }
  return cudaSuccess;
}

// Nothing is ever captured: cudaStreamBeginCapture is not simulated.
SIMGPU_API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
SIMGPU_API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                                unsigned long long* id, cudaGraph_t*,
                                                const cudaGraphNode_t**, const cudaGraphEdgeData**,
                                                size_t*) {
  *status = cudaStreamCaptureStatusNone;
  if (id != nullptr) *id = 0;
  return cudaSuccess;
}
SIMGPU_API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}

SIMGPU_API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  if (const cudaError_t error = simgpu::Usable(); error != cudaSuccess) return error;
  *event = reinterpret_cast<cudaEvent_t>(new EventHandle);
  return cudaSuccess;
}
SIMGPU_API cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return cudaEventCreateWithFlags(event, 0);
}
SIMGPU_API cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete &simgpu::HandleOf(event);
  return cudaSuccess;
}
SIMGPU_API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  if (const cudaError_t error = simgpu::Usable(); error != cudaSuccess) return error;
  EventHandle& handle = simgpu::HandleOf(event);
  auto recorded = Engine::Get().Record(StreamOf(stream));
  const std::lock_guard lock(handle.mutex);
  handle.event = std::move(recorded);
  return cudaSuccess;
}
SIMGPU_API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
SIMGPU_API cudaError_t cudaEventQuery(cudaEvent_t event) {
  const auto last = simgpu::HandleOf(event).last();
  if (last && !Engine::Get().Query(last)) return Fail(cudaErrorNotReady);
  return simgpu::Usable();
}
SIMGPU_API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (const auto last = simgpu::HandleOf(event).last()) Engine::Get().Synchronize(last);
  return simgpu::Usable();
}
/// Time is not simulated.
SIMGPU_API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 0;
  return cudaSuccess;
}
