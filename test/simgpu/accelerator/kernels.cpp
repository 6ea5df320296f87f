// ATen's operators on the accelerator: memory and views as torch's own code makes them, copies, and
// for all others the CPU's kernels (aten/fallback.h).
#include "simgpu/accelerator/kernels.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <torch/library.h>

#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include "simgpu/accelerator/device_allocator.h"
#include "simgpu/accelerator/guard.h"
#include "simgpu/accelerator/host_allocator.h"
#include "simgpu/aten/device_view.h"
#include "simgpu/aten/fallback.h"

namespace simgpu::accelerator {
namespace {

using aten::BelowAll;
using aten::DeviceView;
using aten::Fallback;
using aten::IsOnDevice;

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

c10::Device WithIndex(std::optional<c10::Device> device) {
  return {kType, device && device->has_index() ? device->index() : CurrentDevice()};
}

at::Tensor Empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype,
                 std::optional<c10::Layout>, std::optional<c10::Device> device, std::optional<bool>,
                 std::optional<c10::MemoryFormat> format) {
  const c10::DeviceGuard guard(WithIndex(device));
  return at::detail::empty_generic(size, &DeviceAllocator::Get(), kKeys,
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor EmptyStrided(c10::IntArrayRef size, c10::IntArrayRef stride,
                        std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                        std::optional<c10::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(WithIndex(device));
  return at::detail::empty_strided_generic(size, stride, &DeviceAllocator::Get(), kKeys,
                                           c10::dtype_or_default(dtype));
}

bool IsPinned(const at::Tensor& host) {
  return Engine::Get().host_memory().IsPinned(host.const_data_ptr());
}

/// Makes the streams of two devices wait for each other, around a copy between them.
void Order(const c10::Stream& before, const c10::Stream& after) {
  if (before == after) return;
  c10::Event event(kType);
  event.record(before);
  event.block(after);
}

Operation CopyOf(const at::Tensor& to, const at::Tensor& from) {
  const bool from_device = IsOnDevice(from), to_device = IsOnDevice(to);
  Operation copy;
  copy.kind = Kind::kCopy;
  copy.name = std::string("copy ") + (from_device ? "device" : "host") + " to " +
              (to_device ? "device" : "host");
  const DeviceView target(to), source(from);
  if (to_device || IsPinned(to)) copy.accesses.push_back(target.access(true));
  if (from_device || IsPinned(from)) {
    copy.accesses.push_back(source.access(false));
    copy.run = [=] {
      const BelowAll below;
      target.OnCpu().copy_(source.OnCpu());
    };
    return copy;
  }
  // Pageable memory is read before the call returns.
  const BelowAll below;
  copy.run = [=, staged = from.clone()] {
    const BelowAll within;
    target.OnCpu().copy_(staged);
  };
  return copy;
}

at::Tensor CopyFrom(const at::Tensor& self, const at::Tensor& to, bool non_blocking) {
  if (self.is_same(to) || to.numel() == 0) return to;
  const at::Tensor from = self.sizes() == to.sizes() ? self : self.expand_as(to);
  const c10::Device device = IsOnDevice(to) ? to.device() : self.device();
  const c10::DeviceGuard guard(device);
  const c10::Stream stream = CurrentStream(device.index());
  const bool within = IsOnDevice(from) && IsOnDevice(to);
  if (within) Order(CurrentStream(from.device().index()), stream);
  Engine::Get().Issue(IdOf(stream), CopyOf(to, from));
  if (within) {
    Order(stream, CurrentStream(from.device().index()));
    return to;
  }
  const at::Tensor& host = IsOnDevice(to) ? from : to;
  if (!non_blocking || (!IsOnDevice(to) && !IsPinned(to))) {
    Engine::Get().SynchronizeStream(IdOf(stream));
  } else {
    HostAllocator::Get().Record(host.storage().data_ptr(), stream);
  }
  return to;
}

at::Tensor CopyFromAndResize(const at::Tensor& self, const at::Tensor& to) {
  to.resize_(self.sizes());
  return CopyFrom(self, to, false);
}

at::Scalar LocalScalar(const at::Tensor& self) {
  const c10::DeviceGuard guard(self.device());
  Engine::Get().SynchronizeStream(CurrentId());
  const BelowAll below;
  return DeviceView(self).OnCpu().item();
}

/// Gives a storage more bytes, the first of which are those that it had.
void Grow(c10::StorageImpl& storage, size_t bytes) {
  c10::DataPtr memory = DeviceAllocator::Get().allocate(bytes);
  if (const size_t had = storage.nbytes(); had > 0) {
    Operation copy;
    copy.kind = Kind::kCopy;
    copy.name = "resize";
    const void* from = storage.data();
    void* to = memory.get();
    copy.accesses = {Reads(from, had), Writes(to, had)};
    copy.run = [=] { std::memcpy(Engine::Get().Hands(to), Engine::Get().Hands(from), had); };
    Engine::Get().Issue(CurrentId(), std::move(copy));
  }
  storage.set_data_ptr_noswap(std::move(memory));
  storage.set_nbytes(bytes);
}

const at::Tensor& Resize(const at::Tensor& self, c10::IntArrayRef size,
                         std::optional<c10::MemoryFormat>) {
  const c10::DeviceGuard guard(self.device());
  size_t elements = static_cast<size_t>(self.storage_offset());
  elements += static_cast<size_t>(c10::multiply_integers(size));
  const size_t bytes = elements * self.element_size();
  if (bytes > self.storage().nbytes()) Grow(*self.storage().unsafeGetStorageImpl(), bytes);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

void RecordStream(at::Tensor& self, c10::Stream stream) {
  DeviceAllocator::Get().recordStream(self.storage().data_ptr(), stream);
}

using ViewOf = at::Tensor(const at::Tensor&, c10::IntArrayRef);
using SetStorage = at::Tensor&(at::Tensor&, at::Storage);

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &Empty);
  m.impl("empty_strided", &EmptyStrided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", static_cast<ViewOf*>(&at::native::view));
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("set_.source_Storage", static_cast<SetStorage*>(&at::native::set_));
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("resize_", &Resize);
  m.impl("_copy_from", &CopyFrom);
  m.impl("_copy_from_and_resize", &CopyFromAndResize);
  m.impl("_local_scalar_dense", &LocalScalar);
  m.impl("record_stream", &RecordStream);
  // ATen composes it of others for devices that it does not know, which round otherwise.
  m.impl("native_layer_norm", torch::CppFunction::makeFromBoxedFunction<&Fallback>());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&Fallback>());
}

}  // namespace

void ResizeStorage(const c10::Storage& storage, size_t bytes) {
  const c10::DeviceGuard guard(storage.device());
  if (bytes > storage.nbytes()) return Grow(*storage.unsafeGetStorageImpl(), bytes);
  if (bytes == 0)
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(DeviceAllocator::Get().allocate(0));
  storage.unsafeGetStorageImpl()->set_nbytes(bytes);
}

}  // namespace simgpu::accelerator
