#include "python/held_memory.h"

#include <atomic>
#include <mutex>

namespace hsdp_ckpt::python {

// Memory that a storage and its holders have together. Dropped by each of them, once; the storage
// may do so on any thread.
struct HeldMemory::Shared {
  at::DataPtr memory;
  std::atomic<size_t> owners;
};

namespace {

// For all storages: holders of one may be made and end on several threads, with the GIL or without,
// and each looks at the storage's pointer and may put another one there.
std::mutex pointers_mutex;

at::DataPtr& PointerOf(const at::Storage& storage) {
  return storage.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks();
}

// Whether the storage's pointer is a plain one of its allocator's: nobody looks for more in it than
// the address.
bool CanBeShared(const at::Storage& storage) {
  const at::DataPtr& pointer = PointerOf(storage);
  const at::Allocator* allocator = storage.allocator();
  return storage.device_type() == at::kCPU && storage.resizable() && allocator != nullptr &&
         pointer.get() != nullptr && pointer.get_context() == pointer.get() &&
         pointer.get_deleter() == allocator->raw_deleter();
}

}  // namespace

HeldMemory::HeldMemory(at::Storage storage) : storage_(std::move(storage)) {
  const std::lock_guard<std::mutex> lock(pointers_mutex);
  at::DataPtr& pointer = PointerOf(storage_);
  address_ = pointer.get();
  if (pointer.get_deleter() == &Drop) {
    shared_ = static_cast<Shared*>(pointer.get_context());
    ++shared_->owners;
  } else if (CanBeShared(storage_)) {
    const at::Device device = pointer.device();
    shared_ = new Shared{std::move(pointer), 2};
    pointer = at::DataPtr(shared_->memory.get(), shared_, &Drop, device);
  }
}

HeldMemory::~HeldMemory() {
  if (shared_ == nullptr) return;
  const std::lock_guard<std::mutex> lock(pointers_mutex);
  at::DataPtr& pointer = PointerOf(storage_);
  if (pointer.get_context() == shared_ && shared_->owners == 2)
    pointer = std::move(shared_->memory);  // drops the storage's share
  Drop(shared_);
}

void HeldMemory::Drop(void* shared) {
  auto* const dropped = static_cast<Shared*>(shared);
  if (dropped->owners.fetch_sub(1) == 1) delete dropped;
}

bool HeldMemory::IsLost() const {
  const std::lock_guard<std::mutex> lock(pointers_mutex);
  return storage_ && shared_ == nullptr && PointerOf(storage_).get() != address_;
}

}  // namespace hsdp_ckpt::python
