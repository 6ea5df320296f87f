#include "pickle/pickle_strings.h"

#include "pickle/tokenizer.h"

namespace hsdp_ckpt::pickle {

void ForEachString(std::span<const std::byte> pickle, const std::string& path,
                   const std::function<void(std::string_view)>& call) {
  Tokenizer tokens(pickle, path, Opcodes::kPlainData);
  for (;;) {
    const Token token = tokens.Next();
    switch (token.op) {
      case Op::kStop:
        return;
      case Op::kUnicode:
      case Op::kShortBinUnicode:
      case Op::kBinUnicode:
      case Op::kBinUnicode8:
        call(token.text);
        break;
      default:
        break;
    }
  }
}

}  // namespace hsdp_ckpt::pickle
