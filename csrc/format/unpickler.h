#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "format/pickle_graph.h"

namespace hsdp_ckpt::format {

/// Runs a pickle (protocols 0 to 5) that may hold plain data and the globals of a `.metadata` and
/// nothing else. Never recurses; memory is at most about a hundred times the input. Throws
/// CorruptionError for bytes that are no pickle, Error for a global that is not allowed, with its
/// full name and `path`.
PickleGraph Unpickle(std::span<const std::byte> pickle, const std::string& path);

}  // namespace hsdp_ckpt::format
