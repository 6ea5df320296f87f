#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "format/metadata.h"
#include "pickle/opcodes.h"

namespace hsdp_ckpt::format {

/// The number under which a pickle's memo remembers a value; unset until the value is written.
using MemoSlot = uint32_t;
inline constexpr MemoSlot kUnsetSlot = UINT32_MAX;

/// Texts that were written, in a table of one block: a tensor has two, and a node for each would be
/// three times as large. The texts must outlive the table.
class TextTable {
 public:
  /// Where the text is remembered: unset at first, the caller's to set.
  MemoSlot& operator[](std::string_view text) {
    if (slots_.size() < 2 * (used_ + 1)) Grow();
    Slot& slot = Find(text);
    if (slot.data == nullptr) {
      slot = {text.data(), static_cast<uint32_t>(text.size()), kUnsetSlot};
      ++used_;
    }
    return slot.number;
  }

 private:
  struct Slot {
    const char* data = nullptr;  // null: the slot is free
    uint32_t size = 0;
    MemoSlot number = kUnsetSlot;
  };
  Slot& Find(std::string_view text) {
    size_t at = std::hash<std::string_view>()(text) & (slots_.size() - 1);
    while (slots_[at].data != nullptr &&
           std::string_view(slots_[at].data, slots_[at].size) != text) {
      at = (at + 1) & (slots_.size() - 1);
    }
    return slots_[at];
  }
  void Grow() {
    std::vector<Slot> old(std::max<size_t>(64, 2 * slots_.size()));
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.data != nullptr) Find({slot.data, slot.size}) = slot;
    }
  }

  std::vector<Slot> slots_;
  size_t used_ = 0;
};

/// Writes a pickle of protocol 4, opcode by opcode, in one frame. Strings and shapes come back many
/// times (a chunk's offsets are also its key's) and cannot be changed by whoever loads them, so
/// each is written once and named after that: the file shrinks, and stock's load has fewer calls to
/// make. Texts that are passed in must stay where they are until Finish. One thread at a time.
class PickleWriter {
 public:
  /// `expected`: bytes of the pickle, or more.
  explicit PickleWriter(size_t expected);

  void Put(pickle::Op op) { out_.push_back(static_cast<char>(op)); }
  void Memoize(MemoSlot& slot) {
    Put(pickle::Op::kMemoize);
    slot = memo_count_++;
  }
  /// Names what the memo has in `slot`; false if it has nothing yet.
  bool Recall(MemoSlot slot);

  void Bool(bool value) { Put(value ? pickle::Op::kNewTrue : pickle::Op::kNewFalse); }
  void Int(int64_t value);
  /// An integer of any size, little-endian two's complement of at most 2**31 - 1 bytes.
  void BigInt(std::string_view two_complement);
  void Float(double value);
  void Bytes(std::string_view bytes);
  /// Throws Error for a text of 4 GiB or more.
  void Str(std::string_view text);
  /// A text that is neither named nor remembered.
  void NewStr(std::string_view text);
  void OptionalStr(const std::optional<std::string>& text);
  void StrList(const std::vector<std::string>& strings);
  void Tuple(const Shape& numbers);
  void Size(const Shape& shape);

  /// A module's attribute, and one that is remembered in `slot`.
  void Global(std::string_view module, std::string_view name);
  void Global(MemoSlot& slot, std::string_view module, std::string_view name);
  /// An instance that a call without arguments makes.
  void New(MemoSlot& cls, std::string_view module, std::string_view name);
  /// An instance whose state is a dict: its keys and values follow, then EndInstance.
  void BeginInstance(MemoSlot& cls, std::string_view module, std::string_view name);
  void EndInstance();

  /// STOP. The pickle.
  std::string Finish();

 private:
  void Number(uint64_t value, int bytes);
  void Counted(std::string_view text, pickle::Op one_byte, pickle::Op four_bytes,
               pickle::Op eight_bytes);

  struct ShapeHash {
    size_t operator()(const Shape& shape) const;
  };

  std::string out_;
  MemoSlot memo_count_ = 0;
  TextTable strings_;
  std::unordered_map<Shape, MemoSlot, ShapeHash> shapes_;
  MemoSlot size_class_ = kUnsetSlot;
};

}  // namespace hsdp_ckpt::format
