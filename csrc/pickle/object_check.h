#pragma once

#include <cstddef>
#include <span>

#include "pickle/object_costs.h"

namespace hsdp_ckpt::pickle {

/// Finds out what `torch.load(weights_only=True)` would make of the pickle at the beginning of
/// `bytes`, without making any of it, and returns the pickle's length. That unpickler runs no code,
/// but what it may call takes memory by a number (`bytearray`, `torch.Tensor`), copies what a few
/// bytes recall from the memo (`set`, BUILD), or hands any of these to `_rebuild_from_type_v2`.
/// Here its stack machine runs on sizes alone; `costs` adds them up over pickles that belong
/// together. Throws CorruptionError for a pickle that is malformed or makes more than it should,
/// Error for an opcode that plain data does not need.
size_t CheckPickle(std::span<const std::byte> bytes, ObjectCosts& costs);

/// Whether somewhere in the bytes stands what may be a GLOBAL: without one a pickle calls nothing.
bool NamesGlobal(std::span<const std::byte> bytes);

}  // namespace hsdp_ckpt::pickle
