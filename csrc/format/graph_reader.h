#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "format/metadata.h"
#include "format/pickle_graph.h"

namespace hsdp_ckpt::format {

/// The id of a field that an instance does not have.
inline constexpr PickleGraph::Id kAbsent = std::numeric_limits<PickleGraph::Id>::max();

/// The way to a value, for messages. It lives on the stack and becomes text only when something is
/// wrong: there are millions.
struct Where {
  const Where* parent;
  std::string_view name;
  int64_t index = -1;  ///< a list's item; -1: a field

  std::string Text() const {
    const std::string before = parent ? parent->Text() : "";
    if (index >= 0) return before + "[" + std::to_string(index) + "]";
    return before.empty() ? std::string(name) : before + "." + std::string(name);
  }
};

/// Takes typed values out of an unpickler's graph, and throws CorruptionError where a value is of
/// another kind or absent. Copies are paid for: a pickle names a shared value in two bytes, and
/// here each use is a copy, so their sum is bounded by the pickle's own size. Owns neither the
/// graph nor the path; one thread at a time.
class GraphReader {
 public:
  using Kind = PickleGraph::Kind;
  using Id = PickleGraph::Id;

  GraphReader(const PickleGraph& graph, size_t pickle_size, const std::string& path)
      : graph_(graph), path_(path), work_left_(16 * static_cast<uint64_t>(pickle_size) + 1024) {}

  const PickleGraph& graph() const { return graph_; }

  [[noreturn]] void Fail(const Where& where, std::string_view expected,
                         std::string_view got) const {
    throw base::CorruptionError(path_, where.Text(), std::string(expected), std::string(got));
  }
  /// Stock files use about one unit of work in a byte.
  void Spend(uint64_t work, const Where& where) {
    if (work > work_left_)
      Fail(where, "values in proportion to the file's size",
           "shared values that unfold to far more");
    work_left_ -= work;
  }
  Id Expect(Id id, Kind kind, const Where& where) const {
    if (id == kAbsent || graph_.kind(id) != kind)
      Fail(where, KindName(kind), id == kAbsent ? "nothing" : KindName(graph_.kind(id)));
    return id;
  }
  bool IsNone(Id id) const { return id == kAbsent || graph_.kind(id) == Kind::kNone; }

  /// The fields of an instance, in the order of `names`. The first `required` must be there; a
  /// field that this code does not know, such as a later torch's, is passed over. Returns kAbsent
  /// for what is missing.
  template <size_t N>
  std::array<Id, N> Fields(Id id, PickleGlobal cls, const Where& where,
                           const std::array<std::string_view, N>& names, size_t required) {
    const std::string_view class_name = ClassName(cls);
    if (graph_.kind(id) != Kind::kObject || graph_.integer(id) != static_cast<int64_t>(cls)) {
      Fail(where, class_name, KindName(graph_.kind(id)));
    }
    std::array<Id, N> fields;
    fields.fill(kAbsent);
    const auto items = State(id, where);
    Spend(items.size() + 1, where);
    for (size_t i = 0; i < items.size(); i += 2) {
      const std::string_view key = graph_.text(Expect(items[i], Kind::kString, where));
      const auto name = std::find(names.begin(), names.end(), key);
      if (name == names.end()) continue;
      Id& field = fields[static_cast<size_t>(name - names.begin())];
      if (field != kAbsent) Fail(where, "each field once", "two of " + std::string(key));
      field = items[i + 1];
    }
    for (size_t i = 0; i < required; ++i) {
      if (fields[i] == kAbsent)
        Fail(where, std::string(class_name) + " with " + std::string(names[i]), "none");
    }
    return fields;
  }
  std::string String(Id id, const Where& where) {
    const std::string_view text = graph_.text(Expect(id, Kind::kString, where));
    Spend(1 + text.size() / 16, where);
    return std::string(text);
  }
  std::optional<std::string> OptionalString(Id id, const Where& where) {
    if (IsNone(id)) return std::nullopt;
    return String(id, where);
  }
  int64_t Int(Id id, const Where& where) const {
    return graph_.integer(Expect(id, Kind::kInt, where));
  }
  bool Bool(Id id, const Where& where) const {
    return graph_.integer(Expect(id, Kind::kBool, where)) != 0;
  }
  std::vector<std::string> Strings(Id id, const Where& where) {
    if (graph_.kind(id) != Kind::kTuple) Expect(id, Kind::kList, where);
    std::vector<std::string> strings;
    for (const Id item : graph_.items(id)) strings.push_back(String(item, where));
    return strings;
  }

  /// torch.Size, or a tuple or list in its place: numbers of elements, none negative.
  Shape Size(Id id, const Where& where) {
    Shape shape = Numbers(id, where);
    for (const int64_t number : shape) {
      if (number < 0) Fail(where, "no negative number", std::to_string(number));
    }
    return shape;
  }
  /// As Size, of any numbers.
  Shape Numbers(Id id, const Where& where) {
    const Kind kind = graph_.kind(id);
    if (kind != Kind::kSize && kind != Kind::kTuple && kind != Kind::kList)
      Fail(where, "torch.Size", KindName(kind));
    const auto items = graph_.items(id);
    Spend(items.size(), where);
    Shape shape;
    shape.reserve(items.size());
    for (const Id item : items) shape.push_back(Int(item, where));
    return shape;
  }

 private:
  // The state that BUILD gave to an instance, which is a dict: key, value, key, value, ...
  std::span<const Id> State(Id instance, const Where& where) const {
    const auto state = graph_.items(instance);
    return state.empty() ? state : graph_.items(Expect(state[0], Kind::kDict, where));
  }
  static std::string_view ClassName(PickleGlobal cls) {
    switch (cls) {
      case PickleGlobal::kMetadata:
        return "Metadata";
      case PickleGlobal::kTensorStorageMetadata:
        return "TensorStorageMetadata";
      case PickleGlobal::kChunkStorageMetadata:
        return "ChunkStorageMetadata";
      case PickleGlobal::kMetadataIndex:
        return "MetadataIndex";
      case PickleGlobal::kStorageMeta:
        return "StorageMeta";
      case PickleGlobal::kStorageInfo:
        return "_StorageInfo";
      default:
        return "a class of DCP's metadata";
    }
  }

  const PickleGraph& graph_;
  const std::string& path_;
  uint64_t work_left_;
};

}  // namespace hsdp_ckpt::format
