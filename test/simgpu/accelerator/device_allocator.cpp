#include "simgpu/accelerator/device_allocator.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>

#include "simgpu/accelerator/guard.h"
#include "simgpu/core/engine.h"

namespace simgpu::accelerator {
namespace {

constexpr size_t kGranule = 512;
/// A block that is so many times larger than what is asked for is not taken for it.
constexpr size_t kWaste = 4;

void Poison(const char* name, void* data, size_t bytes, int stream) {
  Operation poison;
  poison.kind = Kind::kPoison;
  poison.name = name;
  poison.accesses = {Writes(data, bytes)};
  poison.run = [=] { std::memset(Engine::Get().Hands(data), 0xff, bytes); };
  Engine::Get().Issue(stream, std::move(poison), /*steps=*/false);  // the allocator's lock is held
}

}  // namespace

DeviceAllocator& DeviceAllocator::Get() {
  static auto& allocator = *new DeviceAllocator;
  return allocator;
}

c10::DataPtr DeviceAllocator::allocate(size_t bytes) {
  const c10::Device device(kType, CurrentDevice());
  if (bytes == 0) return {nullptr, nullptr, &Delete, device};
  const size_t size = (bytes + kGranule - 1) / kGranule * kGranule;
  const int stream = CurrentId();
  const std::lock_guard lock(mutex_);
  TakeBackFreed();
  Block* block = Find(stream, size);
  if (block == nullptr) {
    void* data = Engine::Get().Allocate(device.index(), size);
    TORCH_CHECK_WITH(OutOfMemoryError, data != nullptr, "out of memory: ", device, " has no ", size,
                     " bytes left");
    block = new Block{data, size, stream};
  }
  Poison("an allocation", block->data, block->bytes, stream);
  return {block->data, block, &Delete, device};
}

DeviceAllocator::Block* DeviceAllocator::Find(int stream, size_t bytes) {
  const auto last = free_.upper_bound({stream, kWaste * bytes});
  for (auto at = free_.lower_bound({stream, bytes}); at != last; ++at) {
    if (at->second.empty()) continue;
    Block* block = at->second.back();
    at->second.pop_back();
    return block;
  }
  return nullptr;
}

void DeviceAllocator::Delete(void* context) {
  if (context == nullptr) return;
  auto* block = static_cast<Block*>(context);
  DeviceAllocator& self = Get();
  const std::lock_guard lock(self.mutex_);
  std::vector<std::shared_ptr<Event>> uses;
  for (const int stream : std::exchange(block->uses, {})) {
    uses.push_back(Engine::Get().Record(stream));
  }
  if (uses.empty()) return self.Free(block);
  self.freed_.push_back({block, std::move(uses)});
}

void DeviceAllocator::Free(Block* block) {
  if (poisons_frees_) Poison("a free", block->data, block->bytes, block->stream);
  free_[{block->stream, block->bytes}].push_back(block);
}

void DeviceAllocator::TakeBackFreed() {
  std::erase_if(freed_, [&](const Freed& freed) {
    const auto is_over = [](const auto& event) { return Engine::Get().Query(event); };
    if (!std::all_of(freed.uses.begin(), freed.uses.end(), is_over)) return false;
    Free(freed.block);
    return true;
  });
}

void DeviceAllocator::recordStream(const c10::DataPtr& memory, c10::Stream stream) {
  // Others' memory, and pieces of our own, are not known here.
  if (memory.get_deleter() != &Delete || memory.get_context() == nullptr) return;
  auto* block = static_cast<Block*>(memory.get_context());
  const std::lock_guard lock(mutex_);
  if (IdOf(stream) != block->stream) block->uses.insert(IdOf(stream));
}

void DeviceAllocator::copy_data(void* to, const void* from, size_t bytes) const {
  std::memcpy(Engine::Get().Hands(to), Engine::Get().Hands(from), bytes);
}

void DeviceAllocator::poison_frees(bool poisons) {
  const std::lock_guard lock(mutex_);
  poisons_frees_ = poisons;
}

}  // namespace simgpu::accelerator
