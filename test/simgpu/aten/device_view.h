#pragma once

#include <ATen/ATen.h>
#include <ATen/ThreadLocalState.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <vector>

#include "simgpu/core/engine.h"

namespace simgpu::aten {

/// What a kernel knows of a tensor on the device: where its elements are. It holds no reference:
/// nobody keeps a tensor's memory alive for a kernel.
class DeviceView {
 public:
  DeviceView() = default;
  explicit DeviceView(const at::Tensor& tensor);

  bool defined() const { return data_ != nullptr || is_empty_; }
  /// A tensor of the CPU's over the same bytes.
  at::Tensor OnCpu() const;
  Access access(bool writes) const;

 private:
  void* data_ = nullptr;
  bool is_empty_ = false;
  std::vector<int64_t> sizes_, strides_;
  at::ScalarType dtype_ = at::kFloat;
  bool conjugate_ = false, negative_ = false;
};

/// No modes, no autocast, no autograd: what a device's kernel knows of the thread that launched it.
class BelowAll {
 public:
  BelowAll() : state_(Clean()) {}

 private:
  static const at::ThreadLocalState& Clean();

  at::ThreadLocalStateGuard state_;
  at::AutoDispatchBelowAutograd below_autograd_;
};

}  // namespace simgpu::aten
