#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "pickle/object_costs.h"

namespace hsdp_ckpt::format {

/// Throws CorruptionError if `torch.load(weights_only=True)` would make more of `data`, which
/// `torch.save` wrote in its zip format or in the one before it, than its own size explains, and
/// for a zip that two readers could see two ways. Throws Error for a pickle with an opcode that
/// `torch.load` refuses anyway. `what` begins messages.
void CheckSavedObject(std::span<const std::byte> data, const std::string& what,
                      const pickle::TorchNames& names);

}  // namespace hsdp_ckpt::format
