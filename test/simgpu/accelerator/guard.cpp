// Devices, streams and events, as c10 asks for them.
#include "simgpu/accelerator/guard.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <memory>
#include <utility>
#include <vector>

#include "simgpu/accelerator/device_allocator.h"
#include "simgpu/core/engine.h"

namespace simgpu::accelerator {
namespace {

thread_local c10::DeviceIndex t_device = 0;
thread_local std::vector<c10::StreamId> t_streams;  // by device

/// What c10's events point to.
struct Handle {
  std::shared_ptr<Event> event;
};
const std::shared_ptr<Event>& EventOf(void* handle) { return static_cast<Handle*>(handle)->event; }

c10::DeviceIndex IndexOf(c10::Device device) {
  return device.has_index() ? device.index() : t_device;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }

  c10::Device getDevice() const override { return {kType, t_device}; }
  void setDevice(c10::Device device) const override { SetCurrentDevice(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { t_device = device.index(); }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return DeviceCount(); }
  void synchronizeDevice(c10::DeviceIndex device) const override {
    Engine::Get().SynchronizeDevice(device < 0 ? t_device : device);
  }

  c10::Stream getStream(c10::Device device) const override {
    return CurrentStream(IndexOf(device));
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, {kType, IndexOf(device)});
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return NewStream(IndexOf(device));
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return NewStream(IndexOf(device));
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before = CurrentStream(stream.device_index());
    t_streams.resize(static_cast<size_t>(DeviceCount()));
    t_streams[static_cast<size_t>(stream.device_index())] = stream.id();
    return before;
  }
  bool queryStream(const c10::Stream& stream) const override {
    return Engine::Get().QueryStream(IdOf(stream));
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    Engine::Get().SynchronizeStream(IdOf(stream));
  }

  void record(void** handle, const c10::Stream& stream, c10::DeviceIndex,
              c10::EventFlag) const override {
    if (*handle == nullptr) *handle = new Handle;
    static_cast<Handle*>(*handle)->event = Engine::Get().Record(IdOf(stream));
  }
  void block(void* handle, const c10::Stream& stream) const override {
    if (handle != nullptr) Engine::Get().Wait(IdOf(stream), EventOf(handle));
  }
  bool queryEvent(void* handle) const override {
    return handle == nullptr || Engine::Get().Query(EventOf(handle));
  }
  void synchronizeEvent(void* handle) const override {
    if (handle != nullptr) Engine::Get().Synchronize(EventOf(handle));
  }
  void destroyEvent(void* handle, c10::DeviceIndex) const noexcept override {
    delete static_cast<Handle*>(handle);
  }
  void recordDataPtrOnStream(const c10::DataPtr& memory, const c10::Stream& stream) const override {
    DeviceAllocator::Get().recordStream(memory, stream);
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

}  // namespace

c10::DeviceIndex DeviceCount() { return static_cast<c10::DeviceIndex>(Settings::Get().devices); }

c10::DeviceIndex CurrentDevice() { return t_device; }

void SetCurrentDevice(c10::DeviceIndex device) {
  TORCH_CHECK(device >= 0 && device < DeviceCount(), "no such device: ", int{device});
  t_device = device;
}

c10::Stream CurrentStream(c10::DeviceIndex device) {
  const auto at = static_cast<size_t>(device);
  const c10::StreamId id = at < t_streams.size() ? t_streams[at] : 0;
  return c10::Stream(c10::Stream::UNSAFE, {kType, device}, id);
}

c10::Stream NewStream(c10::DeviceIndex device) {
  return c10::Stream(c10::Stream::UNSAFE, {kType, device}, Engine::Get().CreateStream(device));
}

int IdOf(const c10::Stream& stream) {
  // c10's default streams have the id 0 on each device.
  if (stream.id() == 0) return Engine::Get().default_stream(stream.device_index());
  return static_cast<int>(stream.id());
}

int CurrentId() { return IdOf(CurrentStream(t_device)); }

}  // namespace simgpu::accelerator
