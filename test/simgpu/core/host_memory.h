#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "simgpu/core/clock.h"

namespace simgpu {

/// Pinned memory of the host, and what the device may still be at in it.
///
/// From the issue of a copy until the host has learnt that it is over, the pages of its host side
/// are guarded: they can't be read while the device may write them, nor written while it may read
/// them. A host that touches them too early faults, which is reported with the operation's name,
/// and goes on. So is what system calls get from such a page, as EFAULT. Bytes that only share a
/// guarded page are let through.
class HostMemory {
 public:
  explicit HostMemory(size_t limit) : limit_(limit) {}

  /// Page-locked memory of its own, null beyond the limit.
  void* Allocate(size_t bytes);
  bool Free(void* ptr);
  /// Memory of the program's, by whole pages as the driver takes them. False: some of it is pinned.
  bool Register(void* ptr, size_t bytes);
  /// False: nothing was registered at `ptr`.
  bool Unregister(void* ptr);
  bool IsPinned(const void* ptr) const;
  /// Whether these bytes lie in one block, or in none: a driver refuses copies of others.
  bool AreTogether(const void* ptr, size_t bytes) const;

  /// The device will touch [first, last) in operation `time` of `stream`.
  void Guard(uintptr_t first, uintptr_t last, bool writes, int stream, uint32_t time,
             const std::string& name);
  /// What the host knows to be over is its own again.
  void Release(const Clock& host);
  /// The device's hands on guarded bytes: open while it lives.
  class Opened {
   public:
    Opened(HostMemory& memory, uintptr_t first, uintptr_t last);
    ~Opened();
    Opened(const Opened&) = delete;
    Opened& operator=(const Opened&) = delete;

   private:
    HostMemory& memory_;
    uintptr_t first_, last_;
  };

  /// For the handler of SIGSEGV: whether `address` is on a guarded page, which is open afterwards.
  bool TakeFault(void* address);

 private:
  struct Guarded {
    uintptr_t first, last;
    bool writes;
    int stream;
    uint32_t time;
    std::string name;
  };
  struct Block {
    size_t bytes;
    bool own;
  };

  int AccessOf(uintptr_t page) const;
  void Protect(uintptr_t first_page, uintptr_t last_page);
  bool Overlaps(uintptr_t first, uintptr_t last) const;

  mutable std::recursive_mutex mutex_;
  const size_t limit_;
  size_t pinned_ = 0;
  std::map<uintptr_t, Block> blocks_;
  std::vector<Guarded> guarded_;
  std::multimap<uintptr_t, uintptr_t> opened_;  // by the device's hands
};

}  // namespace simgpu
