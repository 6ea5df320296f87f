#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace hsdp_ckpt::pickle {

/// Whether these bytes are UTF-8 as pickles hold it: lone surrogates (Python's "surrogatepass") are
/// let through, overlong forms and code points above U+10FFFF are not.
bool IsPickleUtf8(std::string_view text);

/// UTF-8 of a protocol 0 string: Latin-1 bytes with \uXXXX and \UXXXXXXXX escapes. Nothing if an
/// escape is malformed.
std::optional<std::string> DecodeRawUnicodeEscape(std::string_view text);

/// Latin-1 bytes of a UTF-8 string, which is how protocols 0 to 2 store `bytes`. Nothing if a
/// character is above U+00FF.
std::optional<std::string> EncodeLatin1(std::string_view utf8);

}  // namespace hsdp_ckpt::pickle
