#pragma once

#include <cstddef>
#include <functional>
#include <span>
#include <string>
#include <string_view>

namespace hsdp_ckpt::pickle {

/// Calls with each str in a pickle (protocols 0 to 5) of plain data and instances, in the order of
/// the file; one that is named again is not passed again. Nothing is made of the pickle, so it
/// takes no memory. Texts are views into it, not checked to be UTF-8; a protocol 0 pickle's are as
/// escaped as they stand there. Throws CorruptionError for bytes that are no such pickle.
void ForEachString(std::span<const std::byte> pickle, const std::string& path,
                   const std::function<void(std::string_view)>& call);

}  // namespace hsdp_ckpt::pickle
