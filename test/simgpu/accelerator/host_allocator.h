#pragma once

#include <ATen/core/CachingHostAllocator.h>

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "simgpu/core/operation.h"

namespace simgpu::accelerator {

/// Pinned memory, in blocks that are given out again once the copies are over that were recorded.
class HostAllocator final : public at::HostAllocator {
 public:
  static HostAllocator& Get();

  /// Raises c10::OutOfMemoryError where no more can be pinned.
  c10::DataPtr allocate(size_t bytes) override;
  void copy_data(void* to, const void* from, size_t bytes) const override;
  /// A stream uses the memory from now on: until what it has been given by now is over.
  bool record_event(void* data, void* context, c10::Stream stream) override;
  /// The same for the memory of any tensor; nothing for what is not this allocator's.
  void Record(const c10::DataPtr& memory, c10::Stream stream);
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}

 private:
  struct Block {
    void* data;
    size_t bytes;
    std::vector<std::shared_ptr<Event>> uses = {};
  };

  static void Delete(void* block);

  std::mutex mutex_;
  std::map<size_t, std::vector<Block*>> free_;
};

}  // namespace simgpu::accelerator
