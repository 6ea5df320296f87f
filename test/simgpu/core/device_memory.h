#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

namespace simgpu {

/// The memory of all devices of this process. Device addresses are mapped without access, so that
/// the host faults where it touches them; the device's own hands reach the same bytes elsewhere.
///
/// Thread safety: none but `DeviceOf` and `Hands`; the engine's lock guards the rest.
class DeviceMemory {
 public:
  DeviceMemory(int devices, size_t bytes_each);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  /// Null where the device has no such room left. Holds 0xff bytes: NaN in every float format.
  void* Allocate(int device, size_t bytes);
  /// Returns how many bytes the allocation had; 0 if there is none at `ptr`.
  size_t Free(void* ptr);
  /// Whether all of [ptr, ptr + bytes) lies in one allocation.
  bool IsAllocated(const void* ptr, size_t bytes) const;
  size_t used(int device) const { return used_.at(static_cast<size_t>(device)); }

  /// -1: no device's memory.
  int DeviceOf(const void* ptr) const;
  /// Where the bytes of a device address can be read and written; other addresses are returned.
  void* Hands(const void* ptr) const;

 private:
  char* begin_of(int device) const { return base_ + static_cast<size_t>(device) * each_; }

  size_t each_, total_;
  char* base_;   // what programs know
  char* hands_;  // the same bytes, with access
  std::map<uintptr_t, size_t> allocated_, free_;
  std::vector<size_t> used_;
};

}  // namespace simgpu
