#pragma once

#include <ATen/core/Tensor.h>

namespace hsdp_ckpt::python {

/// The memory that a storage had when this was made. It stays readable, at its address and with its
/// bytes, whatever becomes of the tensors that lay in it: `tensor.data = ...` and `set_` give a
/// tensor another storage, `untyped_storage().resize_()` gives the storage other memory.
///
/// The storage itself is kept. Its memory is shared with it, by a `DataPtr` of ours in place of its
/// own, if it comes from an allocator of host memory that would free it at a resize; the last of
/// several holders puts the storage's own one back. Other memory (a device's, pinned) can't be
/// shared, since its allocators know their own `DataPtr`s: IsLost() says that it is gone.
///
/// Made, asked and destroyed on any thread; a resize at that very instant is the program's race.
class HeldMemory {
 public:
  HeldMemory() = default;  ///< holds nothing
  explicit HeldMemory(at::Storage storage);
  HeldMemory(HeldMemory&& other) noexcept { Swap(other); }
  HeldMemory& operator=(HeldMemory other) noexcept {
    Swap(other);
    return *this;
  }
  ~HeldMemory();

  bool IsLost() const;
  const at::Storage& storage() const { return storage_; }
  const void* address() const { return address_; }

 private:
  struct Shared;
  static void Drop(void* shared);
  void Swap(HeldMemory& other) noexcept {
    std::swap(storage_, other.storage_);
    std::swap(shared_, other.shared_);
    std::swap(address_, other.address_);
  }

  at::Storage storage_;
  Shared* shared_ = nullptr;
  const void* address_ = nullptr;
};

}  // namespace hsdp_ckpt::python
