// Any bytes at all as an object that torch.save wrote: an answer or one of our exceptions. What the
// machine hands to a builder lies within the bytes, and values nest no deeper than it says.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string_view>

#include "base/bytes.h"
#include "base/error.h"
#include "format/object_archive.h"
#include "pickle/object_machine.h"

namespace hsdp_ckpt {
namespace {

void Require(bool holds) {
  if (!holds) std::abort();
}

/// Knows of each value how deep it is.
class DepthBuilder {
 public:
  using Value = uint32_t;

  explicit DepthBuilder(std::span<const std::byte> input) : input_(base::AsText(input)) {}

  static Value None() { return 1; }
  static Value Bool(bool) { return 1; }
  static Value Int(int64_t) { return 1; }
  static Value Float(double) { return 1; }
  Value LargeInt(std::string_view bytes) const { return Checked(bytes); }
  Value Text(std::string_view utf8) const { return Checked(utf8); }
  Value Bytes(std::string_view bytes) const { return Checked(bytes); }
  Value ByteArray(std::string_view bytes) const { return Checked(bytes); }
  static Value List() { return 1; }
  static Value Dict() { return 1; }
  static Value Set() { return 1; }
  Value Tuple(std::span<Value> items) { return Around(items); }
  Value FrozenSet(std::span<Value> items) { return Around(items); }
  Value Global(std::string_view module, std::string_view attribute) const {
    Checked(module);
    return Checked(attribute);
  }
  Value DottedGlobal(const Value&, const Value&) { return 1; }
  static bool IsFunction(const Value&) { return false; }
  Value Call(const Value& function, const Value& arguments) { return Pair(function, arguments); }
  Value New(const Value& type, const Value& arguments) { return Pair(type, arguments); }
  static Value Storage(const Value&) { return 1; }
  void Append(Value& list, std::span<Value> items) { Fill(list, items); }
  void AddItems(Value& set, std::span<Value> items) { Fill(set, items); }
  void SetItems(Value& dict, std::span<Value> items) {
    Require(items.size() % 2 == 0);
    Fill(dict, items);
  }
  void SetState(Value& object, const Value& state) { object = std::max(object, state + 1); }

 private:
  Value Checked(std::string_view view) const {
    const bool is_inside =
        view.empty() || (view.data() >= input_.data() &&
                         view.data() + view.size() <= input_.data() + input_.size());
    Require(is_inside);
    return 1;
  }
  static Value Around(std::span<Value> items) {
    const Value depth = items.empty() ? 1 : *std::max_element(items.begin(), items.end()) + 1;
    Require(depth <= pickle::kMaxObjectDepth);
    return depth;
  }
  static Value Pair(Value first, Value second) { return std::max(first, second) + 1; }
  static void Fill(Value& holder, std::span<Value> items) {
    Require(!items.empty());
    holder = std::max(holder, Around(items));
  }

  std::string_view input_;
};

void Pickle(std::span<const std::byte> input) {
  DepthBuilder builder(input);
  pickle::ObjectMachine<DepthBuilder> machine(input, "fuzz", builder);
  while (machine.Step()) {
  }
  Require(machine.consumed() <= input.size() && machine.result() <= pickle::kMaxObjectDepth);
}

void Object(std::span<const std::byte> input) {
  const auto entries = format::ReadObjectArchive(input, "fuzz");
  if (!entries) return Pickle(input);
  for (const auto& [name, entry] : *entries) {
    Require(entry.offset <= input.size() && entry.size <= input.size() - entry.offset);
    if (name == "data.pkl") Pickle(input.subspan(entry.offset, entry.size));
  }
}

}  // namespace
}  // namespace hsdp_ckpt

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    hsdp_ckpt::Object(std::as_bytes(std::span(data, size)));
  } catch (const hsdp_ckpt::base::Error&) {
  }
  return 0;
}
