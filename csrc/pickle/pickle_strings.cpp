#include "pickle/pickle_strings.h"

#include "base/bytes.h"
#include "pickle/opcodes.h"

namespace hsdp_ckpt::pickle {
namespace {

std::string_view TakeLine(base::ByteReader& in, std::string_view pickle) {
  const size_t end = pickle.find('\n', in.position());
  if (end == std::string_view::npos) in.Fail("a line", "the end of the file");
  const std::string_view line = in.GetText(end - in.position());
  in.Get(1);
  return line;
}

}  // namespace

void ForEachString(std::span<const std::byte> pickle, const std::string& path,
                   const std::function<void(std::string_view)>& call) {
  base::ByteReader in(pickle, path, "the pickle's strings");
  for (;;) {
    const auto op = static_cast<Op>(in.Get<uint8_t>());
    switch (op) {
      case Op::kStop:
        return;
      case Op::kUnicode:
        call(TakeLine(in, base::AsText(pickle)));
        break;
      case Op::kShortBinUnicode:
        call(in.GetText(in.Get<uint8_t>()));
        break;
      case Op::kBinUnicode:
        call(in.GetText(in.Get<uint32_t>()));
        break;
      case Op::kBinUnicode8:
        call(in.GetText(in.Get<uint64_t>()));
        break;
      // What has other arguments than strings.
      case Op::kShortBinBytes:
      case Op::kLong1:
        in.Get(in.Get<uint8_t>());
        break;
      case Op::kBinBytes:
      case Op::kLong4:
        in.Get(in.Get<uint32_t>());
        break;
      case Op::kBinBytes8:
        in.Get(in.Get<uint64_t>());
        break;
      case Op::kProto:
      case Op::kBinInt1:
      case Op::kBinPut:
      case Op::kBinGet:
        in.Get(1);
        break;
      case Op::kBinInt2:
        in.Get(2);
        break;
      case Op::kBinInt:
      case Op::kLongBinPut:
      case Op::kLongBinGet:
        in.Get(4);
        break;
      case Op::kBinFloat:
      case Op::kFrame:
        in.Get(8);
        break;
      case Op::kGlobal:
        TakeLine(in, base::AsText(pickle));
        [[fallthrough]];
      case Op::kFloat:
      case Op::kInt:
      case Op::kLong:
      case Op::kPut:
      case Op::kGet:
        TakeLine(in, base::AsText(pickle));
        break;
      case Op::kMark:
      case Op::kPop:
      case Op::kPopMark:
      case Op::kDup:
      case Op::kNone:
      case Op::kReduce:
      case Op::kAppend:
      case Op::kBuild:
      case Op::kDict:
      case Op::kAppends:
      case Op::kList:
      case Op::kSetItem:
      case Op::kTuple:
      case Op::kSetItems:
      case Op::kEmptyTuple:
      case Op::kEmptyList:
      case Op::kEmptyDict:
      case Op::kNewObj:
      case Op::kTuple1:
      case Op::kTuple2:
      case Op::kTuple3:
      case Op::kNewTrue:
      case Op::kNewFalse:
      case Op::kEmptySet:
      case Op::kAddItems:
      case Op::kFrozenSet:
      case Op::kStackGlobal:
      case Op::kMemoize:
        break;
      default:
        in.Fail("an opcode of plain data", "opcode " + std::to_string(static_cast<int>(op)));
    }
  }
}

}  // namespace hsdp_ckpt::pickle
