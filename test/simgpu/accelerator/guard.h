#pragma once

#include <c10/core/Device.h>
#include <c10/core/DeviceType.h>
#include <c10/core/Stream.h>

namespace simgpu::accelerator {

/// The type of the devices, which torch leaves to a program: not one of torch's own files knows it.
constexpr auto kType = c10::DeviceType::PrivateUse1;

/// This thread's device.
c10::DeviceIndex CurrentDevice();
/// Raises c10::Error where there is no such device.
void SetCurrentDevice(c10::DeviceIndex device);
c10::DeviceIndex DeviceCount();

/// This thread's stream on a device.
c10::Stream CurrentStream(c10::DeviceIndex device);
c10::Stream NewStream(c10::DeviceIndex device);
/// The engine's number of a stream.
int IdOf(const c10::Stream& stream);
/// That of this thread's stream on its device.
int CurrentId();

}  // namespace simgpu::accelerator
