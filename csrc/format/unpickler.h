#pragma once

#include <cstdint>
#include <deque>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace hsdp_ckpt::format {

/// The globals a `.metadata` may name. None of them is ever looked up or called: each is a tag the
/// machine interprets.
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
  kObject,
};

/// What STOP leaves behind: a graph of nodes. Cycles and shared nodes are possible, as in Python;
/// readers of the graph bound their work. Holds views into the pickle's bytes, which must outlive
/// it.
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

 private:
  friend class Unpickler;
  struct Node {
    Kind kind;
    uint32_t aux = 0;  // index into texts_ or lists_
    union {
      int64_t integer;
      double real;
    };
  };
  std::vector<Node> nodes_;
  std::vector<std::string_view> texts_;
  std::vector<std::vector<Id>> lists_;
  std::deque<std::string>
      owned_;  // text that is escaped in the pickle; a deque, for the views must stay valid
  Id root_ = 0;
};

/// "a list", "an int", ...: for messages.
std::string_view KindName(PickleGraph::Kind kind);

/// Runs a pickle (protocols 0 to 5) that may hold plain data and the globals above and nothing
/// else. Never recurses; memory is at most about a hundred times the input. Throws CorruptionError
/// for bytes that are no pickle, Error for a global that is not allowed, with its full name and
/// `path`.
PickleGraph Unpickle(std::span<const std::byte> pickle, const std::string& path);

}  // namespace hsdp_ckpt::format
