#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/core/Device.h>
#include <c10/core/DispatchKey.h>

#include <string>
#include <vector>

namespace simgpu::aten {

/// The device whose kernels are stood in for.
struct Backend {
  c10::DeviceType type;
  c10::DispatchKey key;
  /// The engine's stream that this thread queues on, on its current device.
  int (*current_stream)();
  /// Called before an operation that makes the host wait: its results tell the host something.
  void (*about_to_wait)();
  /// What a device draws from if nothing is said; null: what the CPU does.
  at::Generator (*default_generator)(c10::Device device);
};
void SetBackend(const Backend& backend);
const Backend& TheBackend();
bool IsOnDevice(const at::Tensor& tensor);

/// Runs an operator of ATen on the device by the CPU's kernel: later, in the order of the stream,
/// on the CPU's view of the same memory. What results look like is asked of the CPU's kernel at
/// once, with zeros. Operators that draw random numbers, or whose results' sizes or values the host
/// has to know, wait for the stream and run at once.
void Fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack);

/// Names of the operators that have run so, for a report of what the simulator has seen.
std::vector<std::string> UsedOperators();

}  // namespace simgpu::aten
