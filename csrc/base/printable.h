#pragma once

#include <string>
#include <string_view>

namespace hsdp_ckpt::base {

/// UTF-8 text with the characters escaped that would move a terminal's cursor or turn its text
/// round: control characters but for line feeds, and Unicode's invisible and bidirectional ones
/// (U+202E and its like). Names come from the checkpoint.
std::string Printable(std::string_view text);

}  // namespace hsdp_ckpt::base
