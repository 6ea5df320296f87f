#include "simgpu/core/device_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <iterator>
#include <system_error>

namespace simgpu {
namespace {

// As cudaMalloc: what torch's allocator asks for are multiples of it.
constexpr size_t kGranule = size_t{2} << 20;

[[noreturn]] void Raise(const char* call) {
  throw std::system_error(errno, std::generic_category(), std::string("simgpu: ") + call);
}

char* Map(size_t bytes, int protection, int flags, int file) {
  void* mapped = mmap(nullptr, bytes, protection, flags | MAP_NORESERVE, file, 0);
  if (mapped == MAP_FAILED) Raise("mmap");
  return static_cast<char*>(mapped);
}

}  // namespace

DeviceMemory::DeviceMemory(int devices, size_t bytes_each)
    : each_(bytes_each / kGranule * kGranule),
      total_(each_ * static_cast<size_t>(devices)),
      used_(static_cast<size_t>(devices)) {
  const int file = memfd_create("simgpu_device", MFD_CLOEXEC);
  if (file < 0) Raise("memfd_create");
  if (ftruncate(file, static_cast<off_t>(total_)) != 0) Raise("ftruncate");
  base_ = Map(total_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
  hands_ = Map(total_, PROT_READ | PROT_WRITE, MAP_SHARED, file);
  close(file);
  for (int d = 0; d < devices; ++d) free_[reinterpret_cast<uintptr_t>(begin_of(d))] = each_;
}

DeviceMemory::~DeviceMemory() {
  munmap(base_, total_);
  munmap(hands_, total_);
}

void* DeviceMemory::Allocate(int device, size_t bytes) {
  const size_t size = (bytes + kGranule - 1) / kGranule * kGranule;
  const auto first = reinterpret_cast<uintptr_t>(begin_of(device));
  for (auto at = free_.lower_bound(first); at != free_.end() && at->first < first + each_; ++at) {
    const auto [place, room] = *at;
    if (room < size) continue;
    free_.erase(at);
    if (room > size) free_[place + size] = room - size;
    allocated_[place] = size;
    used_[static_cast<size_t>(device)] += size;
    auto* ptr = reinterpret_cast<void*>(place);
    std::memset(Hands(ptr), 0xff, bytes);
    return ptr;
  }
  return nullptr;
}

size_t DeviceMemory::Free(void* ptr) {
  const auto at = allocated_.find(reinterpret_cast<uintptr_t>(ptr));
  if (at == allocated_.end()) return 0;
  const auto [place, size] = *at;
  allocated_.erase(at);
  const int device = DeviceOf(ptr);
  used_[static_cast<size_t>(device)] -= size;
  madvise(Hands(ptr), size, MADV_REMOVE);

  // One with its free neighbours, but for those of another device.
  const auto first = reinterpret_cast<uintptr_t>(begin_of(device));
  auto merged = free_.emplace(place, size).first;
  if (const auto next = std::next(merged);
      next != free_.end() && next->first == place + size && next->first < first + each_) {
    merged->second += next->second;
    free_.erase(next);
  }
  if (merged != free_.begin() && place > first) {
    const auto before = std::prev(merged);
    if (before->first + before->second == place) {
      before->second += merged->second;
      free_.erase(merged);
    }
  }
  return size;
}

bool DeviceMemory::IsAllocated(const void* ptr, size_t bytes) const {
  const auto first = reinterpret_cast<uintptr_t>(ptr);
  auto at = allocated_.upper_bound(first);
  if (at == allocated_.begin()) return false;
  --at;
  return first + bytes <= at->first + at->second;
}

int DeviceMemory::DeviceOf(const void* ptr) const {
  const auto* p = static_cast<const char*>(ptr);
  if (p < base_ || p >= base_ + total_) return -1;
  return static_cast<int>(static_cast<size_t>(p - base_) / each_);
}

void* DeviceMemory::Hands(const void* ptr) const {
  if (DeviceOf(ptr) < 0) return const_cast<void*>(ptr);
  return hands_ + (static_cast<const char*>(ptr) - base_);
}

}  // namespace simgpu
