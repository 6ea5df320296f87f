#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <span>

namespace hsdp_ckpt::base {

/// Memory that direct I/O takes: address and size are multiples of 4096. The buffer owns it and can
/// be moved, not copied; its contents start undefined. One thread at a time.
class AlignedBuffer {
 public:
  static constexpr size_t kAlignment = 4096;
  static constexpr size_t kHugePage = size_t{2} << 20;

  AlignedBuffer() = default;
  /// `size` is rounded up to a multiple of kAlignment, or of kHugePage. Throws std::bad_alloc.
  ///
  /// `huge`: of huge pages where the system gives them on request. That halves what a direct write
  /// of it costs the CPU, as the kernel takes hold of each page, but a first byte costs the zeroing
  /// of a whole one: for memory that will be filled.
  explicit AlignedBuffer(size_t size, bool huge = false) {
    const size_t unit = huge ? kHugePage : kAlignment;
    size_ = (size + unit - 1) / unit * unit;
    if (size_ == 0) return;
    if (!huge) {
      data_.reset(static_cast<std::byte*>(std::aligned_alloc(kAlignment, size_)));
      if (!data_) throw std::bad_alloc();
      return;
    }
    // Not malloc's, which would keep it and hand it out in small pieces, with huge pages behind
    // them.
    const size_t mapped = size_ + kHugePage;
    void* const start =
        ::mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) throw std::bad_alloc();
    const auto address = reinterpret_cast<uintptr_t>(start);
    auto* const first =
        static_cast<std::byte*>(start) + (kHugePage - address % kHugePage) % kHugePage;
    data_ = {first, Free{start, mapped}};
    ::madvise(first, size_, MADV_HUGEPAGE);  // a hint: nothing is lost where it is refused
  }

  std::byte* data() const { return data_.get(); }
  size_t size() const { return size_; }
  std::span<std::byte> span() const { return {data_.get(), size_}; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  struct Free {
    Free() : start(nullptr), mapped(0) {}
    Free(void* begin, size_t size) : start(begin), mapped(size) {}
    void* start;  // where the mapping around the buffer begins; null: it came from malloc
    size_t mapped;
    void operator()(std::byte* pointer) const {
      mapped > 0 ? static_cast<void>(::munmap(start, mapped)) : std::free(pointer);
    }
  };
  std::unique_ptr<std::byte, Free> data_;
  size_t size_ = 0;
};

}  // namespace hsdp_ckpt::base
