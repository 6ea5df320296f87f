#include "hsdp/device_streams.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <iterator>
#include <utility>

#include "base/left_out.h"
#include "hsdp/lent_memory.h"

namespace hsdp_ckpt::hsdp {

using base::IsLeftOut;
using base::Ordering;

DeviceStreams::SideStream::SideStream(c10::Stream side)
    : stream(side), event(side.device_type()) {}  // timing off: the default, and the cheap kind

DeviceStreams::DeviceStreams(at::Device device) {
  if (device.is_cpu()) return;
  TORCH_CHECK(!device.is_meta() && c10::impl::hasDeviceGuardImpl(device.type()),
              "torch_hsdp_ckpt shards parameters on the CPU and on devices with streams, not on ",
              device, ": move the module first");
  const c10::impl::VirtualGuardImpl backend(device.type());
  // The priority is high, as a collective that waits behind compute kernels delays the kernels that
  // wait for it.
  sides_.emplace_back(backend.getStreamFromGlobalPool(device, /*isHighPriority=*/true));
  sides_.emplace_back(backend.getStreamFromGlobalPool(device, /*isHighPriority=*/true));
}

std::shared_ptr<DeviceStreams> DeviceStreams::Of(at::Device device) {
  // A process has one pair of streams a device. The map is never destroyed: at exit the device's
  // driver may be gone before a static would be.
  static auto& made = *new std::map<at::Device, std::shared_ptr<DeviceStreams>,
                                    bool (*)(const at::Device&, const at::Device&)>(
      [](const at::Device& a, const at::Device& b) {
        return std::pair(a.type(), a.index()) < std::pair(b.type(), b.index());
      });
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  auto& streams = made[device];
  if (!streams) streams = std::make_shared<DeviceStreams>(device);
  return streams;
}

c10::Stream DeviceStreams::Current() const {
  const c10::Device device = sides_[0].stream.device();
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

DeviceStreams::Scope DeviceStreams::Enter(Side which, const Place& place) {
  if (!sides_.empty() && !IsLeftOut(Ordering::kEnter, place)) {
    const std::lock_guard lock(mutex_);
    SideStream& side = StreamOf(which);
    const c10::Stream current = Current();
    if (current != side.stream) {
      side.event.record(current);
      side.event.block(side.stream);
    }
  }
  return Within(which, place);
}

DeviceStreams::Scope DeviceStreams::Within(Side which, const Place& place) {
  if (sides_.empty() || IsLeftOut(Ordering::kWithin, place)) return {};
  return {*this, which};
}

void DeviceStreams::Given(Side which) {
  const std::lock_guard lock(mutex_);
  ++StreamOf(which).given;
}

void DeviceStreams::Record(Side which, Mark& mark, std::vector<WorkPtr> works) {
  if (sides_.empty()) return;
  const std::lock_guard lock(mutex_);
  SideStream& side = StreamOf(which);
  mark.side_ = which;
  mark.given_ = ++side.given;
  mark.works_ = std::move(works);
  if (!mark.works_.empty()) return;
  if (!mark.event_) mark.event_.emplace(side.stream.device_type());
  mark.event_->record(side.stream);
}

void DeviceStreams::Join(Mark& mark, const Place& place) {
  const std::optional<Side> which = std::exchange(mark.side_, {});
  const std::vector<WorkPtr> works = std::exchange(mark.works_, {});
  if (!which || IsLeftOut(Ordering::kJoin, place)) return;
  const c10::Stream current = Current();
  {
    const std::lock_guard lock(mutex_);
    if (StreamOf(*which).joined[current.id()] >= mark.given_) return;
  }
  for (const WorkPtr& work : works) work->wait();
  if (works.empty()) mark.event_->block(current);
}

void DeviceStreams::Join(Side which, const Place& place) {
  if (sides_.empty() || IsLeftOut(Ordering::kJoin, place)) return;
  const std::lock_guard lock(mutex_);
  SideStream& side = StreamOf(which);
  const c10::Stream current = Current();
  uint64_t& joined = side.joined[current.id()];
  if (joined == side.given || current == side.stream) return;
  side.event.record(side.stream);
  side.event.block(current);
  joined = side.given;
}

void DeviceStreams::AwaitOnHost(Side which, const Place& place) {
  if (sides_.empty() || IsLeftOut(Ordering::kJoin, place)) return;
  StreamOf(which).stream.synchronize();
}

void DeviceStreams::Uses(const at::Tensor& tensor, const Place& place) {
  if (sides_.empty() || !tensor.defined() || IsLeftOut(Ordering::kUses, place)) return;
  const at::DataPtr& memory = OwnedMemory(tensor);
  if (memory.get() == nullptr) return;
  const c10::Stream current = Current();
  c10::impl::VirtualGuardImpl(current.device_type()).recordDataPtrOnStream(memory, current);
}

void DeviceStreams::Hold(Side side, std::vector<at::Tensor> tensors, Held& held,
                         std::vector<WorkPtr> works, const Place& place) {
  if (sides_.empty() || tensors.empty() || IsLeftOut(Ordering::kHold, place)) return;
  held.tensors_.insert(held.tensors_.end(), std::make_move_iterator(tensors.begin()),
                       std::make_move_iterator(tensors.end()));
  Record(side, held.used_, std::move(works));
}

void DeviceStreams::Release(Held& held, const Place& place) {
  Join(held.used_, place);
  // A no-op for memory of the current stream.
  for (const at::Tensor& tensor : std::exchange(held.tensors_, {})) Uses(tensor, place);
}

}  // namespace hsdp_ckpt::hsdp
