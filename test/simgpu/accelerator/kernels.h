#pragma once

#include <c10/core/Storage.h>

#include <cstddef>

namespace simgpu::accelerator {

/// `untyped_storage().resize_`: a storage without bytes has given its memory back.
void ResizeStorage(const c10::Storage& storage, size_t bytes);

}  // namespace simgpu::accelerator
