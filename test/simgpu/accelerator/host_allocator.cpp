#include "simgpu/accelerator/host_allocator.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>

#include "simgpu/accelerator/guard.h"
#include "simgpu/core/engine.h"

namespace simgpu::accelerator {

HostAllocator& HostAllocator::Get() {
  static auto& allocator = *new HostAllocator;
  return allocator;
}

c10::DataPtr HostAllocator::allocate(size_t bytes) {
  constexpr size_t kPage = 4096;
  const size_t size = std::max(kPage, (bytes + kPage - 1) / kPage * kPage);
  const std::lock_guard lock(mutex_);
  std::vector<Block*>& blocks = free_[size];
  const auto is_free = [](const Block* block) {
    return std::all_of(block->uses.begin(), block->uses.end(),
                       [](const auto& event) { return Engine::Get().Query(event); });
  };
  Block* block = nullptr;
  if (const auto at = std::find_if(blocks.begin(), blocks.end(), is_free); at != blocks.end()) {
    block = *at;
    blocks.erase(at);
    block->uses.clear();
  } else {
    void* data = Engine::Get().host_memory().Allocate(size);
    TORCH_CHECK_WITH(OutOfMemoryError, data != nullptr, "out of pinned memory: ", size, " bytes");
    block = new Block{data, size};
  }
  return {block->data, block, &Delete, c10::DeviceType::CPU};
}

void HostAllocator::Delete(void* context) {
  auto* block = static_cast<Block*>(context);
  const std::lock_guard lock(Get().mutex_);
  Get().free_[block->bytes].push_back(block);
}

bool HostAllocator::record_event(void*, void* context, c10::Stream stream) {
  const std::lock_guard lock(mutex_);
  static_cast<Block*>(context)->uses.push_back(Engine::Get().Record(IdOf(stream)));
  return true;
}

void HostAllocator::Record(const c10::DataPtr& memory, c10::Stream stream) {
  if (memory.get_deleter() == &Delete) record_event(memory.get(), memory.get_context(), stream);
}

void HostAllocator::copy_data(void* to, const void* from, size_t bytes) const {
  std::memcpy(to, from, bytes);
}

}  // namespace simgpu::accelerator
