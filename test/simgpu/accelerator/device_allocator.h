#pragma once

#include <c10/core/CachingDeviceAllocator.h>

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "simgpu/core/operation.h"
#include "simgpu/core/settings.h"

namespace simgpu::accelerator {

/// Device memory in blocks that belong to the stream that was current when they were given out.
/// What that stream frees it gets again at once; what another stream was recorded on, only once
/// that has passed the free. Given out and taken back, a block is poisoned by its stream: whoever
/// uses it on another stream without having said so races with that.
class DeviceAllocator final : public c10::DeviceAllocator {
 public:
  static DeviceAllocator& Get();

  /// On the current device. Raises c10::OutOfMemoryError.
  c10::DataPtr allocate(size_t bytes) override;
  void recordStream(const c10::DataPtr& memory, c10::Stream stream) override;
  void copy_data(void* to, const void* from, size_t bytes) const override;
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override { return {}; }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override {}

  /// False: frees do not poison, for programs that rely on nobody being given the block meanwhile.
  void poison_frees(bool poisons);

 private:
  struct Block {
    void* data;
    size_t bytes;
    int stream;
    std::set<int> uses = {};  // on other streams
  };
  struct Freed {
    Block* block;
    std::vector<std::shared_ptr<Event>> uses;
  };

  static void Delete(void* block);
  void Free(Block* block);
  void TakeBackFreed();
  Block* Find(int stream, size_t bytes);

  std::mutex mutex_;
  std::map<std::pair<int, size_t>, std::vector<Block*>> free_;  // by stream and size
  std::vector<Freed> freed_;                                    // still in use
  bool poisons_frees_ = Settings::Get().poison_frees;
};

}  // namespace simgpu::accelerator
