#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <span>

namespace hsdp_ckpt {

/// Memory that direct I/O takes: starts at a multiple of 4096, as does its size. Owns it; movable. Contents start
/// undefined.
class AlignedBuffer {
 public:
  static constexpr size_t kAlignment = 4096;

  AlignedBuffer() = default;
  /// `size` is rounded up to a multiple of kAlignment. Throws std::bad_alloc.
  explicit AlignedBuffer(size_t size) : size_((size + kAlignment - 1) / kAlignment * kAlignment) {
    if (size_ == 0) return;
    data_.reset(static_cast<std::byte*>(std::aligned_alloc(kAlignment, size_)));
    if (!data_) throw std::bad_alloc();
  }

  std::byte* data() const { return data_.get(); }
  size_t size() const { return size_; }
  std::span<std::byte> span() const { return {data_.get(), size_}; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  struct Free {
    void operator()(std::byte* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<std::byte, Free> data_;
  size_t size_ = 0;
};

}  // namespace hsdp_ckpt
