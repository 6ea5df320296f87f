#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "format/types.h"

namespace hsdp_ckpt::format {

// The classes of torch.distributed.checkpoint.metadata and filesystem._StorageInfo, field by field.
// Sequences of pairs stand for Python's dicts: they keep the file's order, and the decoder has seen
// to it that no key comes twice.

/// Numbers of elements, one a dimension.
using Shape = std::vector<int64_t>;

/// `offsets` and `sizes` are in elements and have the tensor's rank.
struct ChunkMetadata {
  Shape offsets;
  Shape sizes;
  bool operator==(const ChunkMetadata&) const = default;
};

struct TensorProperties {
  Dtype dtype = Dtype::k_float32;
  Layout layout = Layout::k_strided;
  bool requires_grad = false;
  MemoryFormat memory_format = MemoryFormat::kContiguous;
  bool pin_memory = false;
  std::optional<Shape> strides;  // in elements; written by torch 2.15, absent before it
  bool operator==(const TensorProperties&) const = default;
};

struct TensorMetadata {
  TensorProperties properties;
  Shape size;
  std::vector<ChunkMetadata> chunks;
  bool operator==(const TensorMetadata&) const = default;
};

/// Anything but a tensor: saved as bytes that only `torch.load` looks into.
struct BytesMetadata {
  bool operator==(const BytesMetadata&) const = default;
};

using EntryMetadata = std::variant<TensorMetadata, BytesMetadata>;

/// Which chunk of which entry. `offset` is a tensor chunk's, `index` only a hint that takes no part
/// in comparisons.
struct MetadataIndex {
  std::string fqn;
  std::optional<Shape> offset;
  std::optional<int64_t> index;
  bool operator==(const MetadataIndex& other) const {
    return fqn == other.fqn && offset == other.offset;
  }
};

/// Where a record lies: `length` bytes from byte `offset` of the file `relative_path`, a name
/// inside the checkpoint's directory (the decoder lets no other pass).
struct StorageInfo {
  std::string relative_path;
  int64_t offset = 0;
  int64_t length = 0;
  std::optional<std::vector<std::string>> transform_descriptors;
  bool operator==(const StorageInfo&) const = default;
};

/// A `pathlib` path: the class's name ("PosixPath") and the parts it was made of.
struct PathlibPath {
  std::string class_name;
  std::vector<std::string> parts;
  bool operator==(const PathlibPath&) const = default;
};

struct StorageMeta {
  std::variant<std::monostate, std::string, PathlibPath> checkpoint_id;
  std::optional<std::string> save_id;
  std::optional<std::string> load_id;
  std::vector<std::string> modules;
  bool operator==(const StorageMeta&) const = default;
};

/// A Python value of plain types only. `nodes` lists children before their parents, so there are no
/// cycles; a value that Python shares is one node with several parents. The last node is the value
/// itself.
struct PlainData {
  using Id = uint32_t;
  struct None {
    bool operator==(const None&) const = default;
  };
  struct BigInt {
    std::string two_complement;  // little-endian
    bool operator==(const BigInt&) const = default;
  };
  struct Bytes {
    std::string value;
    bool operator==(const Bytes&) const = default;
  };
  enum class Kind : uint8_t { kTuple, kList, kDict, kSet, kFrozenSet };
  struct Container {
    Kind kind;
    std::vector<Id> items;  // a dict's are key, value, key, value, ...
    bool operator==(const Container&) const = default;
  };
  using Node = std::variant<None, bool, int64_t, BigInt, double, std::string, Bytes, Container>;

  std::vector<Node> nodes;
  bool operator==(const PlainData&) const = default;
};

/// Levels of containers in a PlainData that are written and read; DCP's own has 2.
inline constexpr int kMaxPlainDepth = 200;

/// DCP's `Metadata`: the whole content of a checkpoint's `.metadata` file.
struct Metadata {
  std::vector<std::pair<std::string, EntryMetadata>> state_dict_metadata;
  PlainData planner_data;
  std::optional<std::vector<std::pair<MetadataIndex, StorageInfo>>> storage_data;
  std::optional<StorageMeta> storage_meta;
  std::optional<std::string> version;
  bool operator==(const Metadata&) const = default;
};

/// Whether a file's name can only lie inside the directory it is joined to: relative, no empty
/// part, no "." or "..", no NUL.
bool IsInsideDirectory(std::string_view relative_path);

/// The largest `.metadata` file that can be read: its values are numbered with 32 bits. A million
/// chunks make about 100 MiB.
inline constexpr int64_t kMaxMetadataBytes = (int64_t{1} << 32) - 2;

/// Decodes the bytes of a `.metadata` file, written by this package or by stock torch. `path` only
/// names the file in errors. The input is not trusted: nothing in it can run, and memory and time
/// are bounded by a multiple of its size. Throws CorruptionError where bytes are not what the
/// format or our trailer says, Error for a class that is neither DCP's nor plain data.
Metadata DecodeMetadata(std::span<const std::byte> file, const std::string& path);

/// The bytes of a `.metadata` file: a pickle that every torch which knows these classes loads into
/// an equal value (strides need 2.15), and our trailer. Throws Error for a record that is not
/// inside the directory, and for planner data that is not in order or nested deeper than 200
/// levels.
std::string EncodeMetadata(const Metadata& metadata);

}  // namespace hsdp_ckpt::format
