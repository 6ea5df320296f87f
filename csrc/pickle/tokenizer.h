#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "pickle/opcodes.h"

// The room `pickle`: what the bytes of a pickle say, without making anything of it. May use: base.
// In come bytes that nobody has vouched for; out go opcodes, strings, and the answer whether an
// object takes more memory than its size explains. What the opcodes make (a `.metadata`'s values, a
// tensor's description) is told by `format`, which reads through the tokenizer.
namespace hsdp_ckpt::pickle {

/// One opcode of a pickle and its argument. The views are into the pickle.
struct Token {
  Op op;
  size_t position;        ///< of the opcode, in bytes from the pickle's start
  uint64_t number = 0;    ///< an argument of 1, 2, 4 or 8 bytes, as little-endian unsigned number
  std::string_view text;  ///< the bytes after a count, or a line without its end
  std::string_view second_line;  ///< GLOBAL's and INST's attribute; `text` is the module
};

/// Which opcodes a tokenizer lets pass.
enum class Opcodes : uint8_t {
  /// Those that plain data and instances need. Refused: persistent ids, the extension registry,
  /// out-of-band buffers, bytearrays, and what only Python 2 writes.
  kPlainData,
  kAll,
};

/// Takes a pickle apart, protocols 0 to 5: one opcode after the other, each argument checked
/// against the end of the bytes before it is passed on. Allocates nothing and keeps no stack: what
/// the opcodes do is the reader's to know. Does not own the bytes; one thread at a
/// time.
class Tokenizer {
 public:
  /// `path` names the pickle in errors.
  Tokenizer(std::span<const std::byte> pickle, std::string path, Opcodes opcodes);

  /// The next opcode, up to STOP and beyond it if asked. Throws CorruptionError for bytes that end
  /// too early and for an opcode that may not pass; Fail says where.
  Token Next();
  /// How many bytes come after the last token.
  size_t remaining() const { return input_.size() - at_; }
  /// Throws CorruptionError about the last token.
  [[noreturn]] void Fail(std::string_view expected, std::string_view got) const;
  /// "pickle at byte 17": the last token's place, for messages.
  std::string Place() const;

 private:
  [[noreturn]] void FailTooShort(uint64_t count) const;
  std::string_view Take(uint64_t count);
  std::string_view TakeLine();
  uint64_t TakeNumber(size_t bytes);

  std::string_view input_;
  std::string path_;
  Opcodes opcodes_;
  size_t at_ = 0;
  size_t op_at_ = 0;
};

/// An opcode's name in Python's pickletools, such as "BINUNICODE"; empty for no opcode.
std::string_view OpcodeName(Op op);

/// The value of LONG1's or LONG4's argument, two's complement of 8 bytes at the most.
int64_t LittleEndianInteger(std::string_view two_complement);

}  // namespace hsdp_ckpt::pickle
