#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace hsdp_ckpt::format {

/// The globals a `.metadata` may name. None of them is ever looked up or called: each is a tag that
/// the unpickler interprets.
enum class PickleGlobal : uint8_t {
  // Classes that pickle as an instance with a state.
  kMetadata,
  kTensorStorageMetadata,
  kBytesStorageMetadata,
  kChunkStorageMetadata,
  kTensorProperties,
  kMetadataIndex,
  kStorageMeta,
  kStorageInfo,
  // Callables that pickle names in a REDUCE; here they are evaluated to nodes of their own kinds.
  kSize,
  kGetLayout,
  kMemoryFormat,
  kPathlib,
  kGetattr,
  kSet,
  kFrozenSet,
  kBytes,
  kCodecsEncode,
  kReconstructor,
  kNewObject,
  // An argument of copyreg's callables, and nothing else.
  kObject,
};

/// A global that is allowed, and its name without the module.
struct NamedGlobal {
  PickleGlobal global;
  std::string_view name;
};

/// Nothing for a global that a `.metadata` may not name.
std::optional<NamedGlobal> FindGlobal(std::string_view module, std::string_view name);
inline bool IsClass(PickleGlobal global) { return global <= PickleGlobal::kStorageInfo; }
inline bool IsCallable(PickleGlobal global) {
  return !IsClass(global) && global != PickleGlobal::kObject;
}

/// What a pickle leaves behind: a graph of nodes. Cycles and shared nodes are possible, as in
/// Python; readers of the graph bound their work. Holds views into the pickle's bytes, which must
/// outlive it. Not thread-safe while it grows.
class PickleGraph {
 public:
  using Id = uint32_t;
  enum class Kind : uint8_t {
    kNone,
    kBool,          // integer
    kInt,           // integer
    kBigInt,        // text: little-endian two's complement
    kFloat,         // real
    kString,        // text: valid UTF-8, lone surrogates included as Python writes them
    kBytes,         // text
    kTuple,         // items
    kList,          // items
    kDict,          // items: key, value, key, value, ...
    kSet,           // items
    kFrozenSet,     // items
    kSize,          // items: torch.Size
    kPath,          // items: strings; path_class: name of the pathlib class
    kDtype,         // integer: Dtype
    kLayout,        // integer: Layout
    kMemoryFormat,  // integer: MemoryFormat
    kGlobal,        // integer: PickleGlobal; text: name
    kObject,        // integer: PickleGlobal; items: the state, or nothing before BUILD
  };

  Kind kind(Id id) const { return nodes_[id].kind; }
  int64_t integer(Id id) const { return nodes_[id].integer; }
  double real(Id id) const { return nodes_[id].real; }
  std::string_view text(Id id) const { return texts_[nodes_[id].aux]; }
  std::string_view path_class(Id id) const {
    return texts_[static_cast<size_t>(nodes_[id].integer)];
  }
  std::span<const Id> items(Id id) const { return lists_[nodes_[id].aux]; }
  Id root() const { return root_; }
  size_t size() const { return nodes_.size(); }

  /// Each adds one node and returns its id.
  Id Add(Kind kind, int64_t integer = 0) { return AddNode({kind, 0, {integer}}); }
  Id AddReal(double real);
  /// `text` must outlive the graph.
  Id AddText(Kind kind, std::string_view text) { return AddNode({kind, AddView(text), {0}}); }
  Id AddOwnedText(Kind kind, std::string text);
  Id AddGlobal(const NamedGlobal& global);
  Id AddItems(Kind kind, std::vector<Id> items, int64_t integer = 0);
  /// A node of another kind over the items of `of`. Never a copy: a shared tuple could be named a
  /// million times.
  Id AddSameItems(Kind kind, Id of) { return AddNode({kind, nodes_[of].aux, {0}}); }
  /// A path of the class that `cls`, a global, names.
  Id AddPath(Id cls, Id parts) {
    return AddNode({Kind::kPath, nodes_[parts].aux, {nodes_[cls].aux}});
  }

  void Append(Id container, std::span<const Id> items);
  void set_root(Id root) { root_ = root; }

 private:
  struct Node {
    Kind kind;
    uint32_t aux;  // index into texts_ or lists_
    union {
      int64_t integer;
      double real;
    };
  };
  Id AddNode(const Node& node) {
    nodes_.push_back(node);
    return static_cast<Id>(nodes_.size() - 1);
  }
  uint32_t AddView(std::string_view text) {
    texts_.push_back(text);
    return static_cast<uint32_t>(texts_.size() - 1);
  }

  std::vector<Node> nodes_;
  std::vector<std::string_view> texts_;
  std::vector<std::vector<Id>> lists_;
  // Text that is escaped in the pickle; a deque, for the views must stay valid.
  std::deque<std::string> owned_;
  Id root_ = 0;
};

/// "a list", "an int", ...: for messages.
std::string_view KindName(PickleGraph::Kind kind);

}  // namespace hsdp_ckpt::format
