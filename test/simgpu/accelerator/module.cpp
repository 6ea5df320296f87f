// What Python sees of the accelerator, and what makes it one of torch's devices.
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>

#include "simgpu/accelerator/device_allocator.h"
#include "simgpu/accelerator/guard.h"
#include "simgpu/accelerator/host_allocator.h"
#include "simgpu/accelerator/kernels.h"
#include "simgpu/accelerator/process_group.h"
#include "simgpu/aten/fallback.h"
#include "simgpu/core/engine.h"
#include "simgpu/core/findings.h"

namespace simgpu::accelerator {
namespace {

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return DeviceCount(); }
  c10::DeviceIndex getCurrentDevice() const override { return CurrentDevice(); }
  void setCurrentDevice(c10::DeviceIndex device) const override { SetCurrentDevice(device); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    const c10::DeviceIndex before = CurrentDevice();
    SetCurrentDevice(device);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return device < 0 ? CurrentDevice() : exchangeDevice(device);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &HostAllocator::Get(); }
  bool isPinnedPtr(const void* data) const override {
    const Engine* engine = Engine::IfMade();
    return engine != nullptr && Engine::Get().host_memory().IsPinned(data);
  }
  at::Device getDeviceFromPtr(void* data) const override {
    return {kType, static_cast<c10::DeviceIndex>(Engine::Get().DeviceOf(data))};
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    ResizeStorage(storage, bytes);
  }
};

}  // namespace
}  // namespace simgpu::accelerator

PYBIND11_MODULE(simgpu_accelerator, m) {
  using namespace simgpu;
  using namespace simgpu::accelerator;
  aten::SetBackend({kType, c10::DispatchKey::PrivateUse1, &CurrentId, [] {}, nullptr});
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  c10::SetAllocator(kType, &DeviceAllocator::Get());
  at::setHostAllocator(kType, &HostAllocator::Get());

  m.def("device_count", [] { return int{DeviceCount()}; });
  m.def("current_device", [] { return int{CurrentDevice()}; });
  m.def("set_device", [](int device) { SetCurrentDevice(static_cast<c10::DeviceIndex>(device)); });
  m.def("poison_frees", [](bool poisons) { DeviceAllocator::Get().poison_frees(poisons); });
  m.def("findings_text", [] { return Findings::Get().text(); });
  m.def("clear_findings", [] { Findings::Get().Clear(); });
  m.def("used_operators", &aten::UsedOperators);
  m.def("make_backend", [](const c10::intrusive_ptr<c10d::Store>& store, int rank, int size) {
    return c10::static_intrusive_pointer_cast<c10d::Backend>(
        c10::make_intrusive<ProcessGroup>(store, rank, size));
  });
  m.attr("BACKEND") = ProcessGroup::kName;
}
