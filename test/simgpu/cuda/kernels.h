#pragma once

#include <functional>
#include <string>

#include "simgpu/core/operation.h"

namespace simgpu {

/// A launch as the runtime gets it: so many blocks of so many threads, and where each argument is.
struct Launch {
  unsigned blocks = 0, threads = 0;
  void** arguments = nullptr;
};
/// Makes the operation of a launch; its arguments are read at once.
using KernelCode = std::function<Operation(const Launch&)>;

/// The code of a kernel by the name that its compiler gave it; empty if there is none.
KernelCode FindKernel(const std::string& mangled);

}  // namespace simgpu
