#include "format/pickle_graph.h"

#include <utility>

namespace hsdp_ckpt::format {
namespace {

struct AllowedGlobal {
  std::string_view module;
  std::string_view name;
  PickleGlobal global;
};

constexpr std::string_view kDcp = "torch.distributed.checkpoint.metadata";
constexpr std::string_view kOldDcp =
    "torch.distributed._shard.sharded_tensor.metadata";  // its home before torch 2.4
constexpr AllowedGlobal kAllowed[] = {
    {kDcp, "Metadata", PickleGlobal::kMetadata},
    {kDcp, "TensorStorageMetadata", PickleGlobal::kTensorStorageMetadata},
    {kDcp, "BytesStorageMetadata", PickleGlobal::kBytesStorageMetadata},
    {kDcp, "ChunkStorageMetadata", PickleGlobal::kChunkStorageMetadata},
    {kDcp, "TensorProperties", PickleGlobal::kTensorProperties},
    {kOldDcp, "TensorProperties", PickleGlobal::kTensorProperties},
    {kDcp, "_MEM_FORMAT_ENCODING", PickleGlobal::kMemoryFormat},
    {kOldDcp, "MEM_FORMAT_ENCODING", PickleGlobal::kMemoryFormat},
    {kDcp, "MetadataIndex", PickleGlobal::kMetadataIndex},
    {kDcp, "StorageMeta", PickleGlobal::kStorageMeta},
    {"torch.distributed.checkpoint.filesystem", "_StorageInfo", PickleGlobal::kStorageInfo},
    {"torch", "Size", PickleGlobal::kSize},
    {"torch.serialization", "_get_layout", PickleGlobal::kGetLayout},
    // A checkpoint id may be a path; Python 3.13 moved the classes for a while.
    {"pathlib", "PosixPath", PickleGlobal::kPathlib},
    {"pathlib", "PurePosixPath", PickleGlobal::kPathlib},
    {"pathlib", "WindowsPath", PickleGlobal::kPathlib},
    {"pathlib", "PureWindowsPath", PickleGlobal::kPathlib},
    {"pathlib._local", "PosixPath", PickleGlobal::kPathlib},
    {"pathlib._local", "PurePosixPath", PickleGlobal::kPathlib},
    {"pathlib._local", "WindowsPath", PickleGlobal::kPathlib},
    {"pathlib._local", "PureWindowsPath", PickleGlobal::kPathlib},
    // Python 3.11 pickles an enum's member as getattr(class, name).
    {"builtins", "getattr", PickleGlobal::kGetattr},
    {"__builtin__", "getattr", PickleGlobal::kGetattr},
    // How protocols below 4 write sets, bytes and instances.
    {"builtins", "set", PickleGlobal::kSet},
    {"__builtin__", "set", PickleGlobal::kSet},
    {"builtins", "frozenset", PickleGlobal::kFrozenSet},
    {"__builtin__", "frozenset", PickleGlobal::kFrozenSet},
    {"builtins", "bytes", PickleGlobal::kBytes},
    {"__builtin__", "bytes", PickleGlobal::kBytes},
    {"_codecs", "encode", PickleGlobal::kCodecsEncode},
    {"copyreg", "_reconstructor", PickleGlobal::kReconstructor},
    {"copy_reg", "_reconstructor", PickleGlobal::kReconstructor},
    {"copyreg", "__newobj__", PickleGlobal::kNewObject},
    {"copy_reg", "__newobj__", PickleGlobal::kNewObject},
    {"builtins", "object", PickleGlobal::kObject},
    {"__builtin__", "object", PickleGlobal::kObject},
};

}  // namespace

std::optional<NamedGlobal> FindGlobal(std::string_view module, std::string_view name) {
  for (const AllowedGlobal& allowed : kAllowed) {
    if (allowed.module == module && allowed.name == name)
      return NamedGlobal{allowed.global, allowed.name};
  }
  return std::nullopt;
}

PickleGraph::Id PickleGraph::AddReal(double real) {
  const Id id = Add(Kind::kFloat);
  nodes_[id].real = real;
  return id;
}

PickleGraph::Id PickleGraph::AddOwnedText(Kind kind, std::string text) {
  return AddText(kind, owned_.emplace_back(std::move(text)));
}

PickleGraph::Id PickleGraph::AddGlobal(const NamedGlobal& global) {
  const auto tag = static_cast<int64_t>(global.global);
  return AddNode({Kind::kGlobal, AddView(global.name), {tag}});
}

PickleGraph::Id PickleGraph::AddItems(Kind kind, std::vector<Id> items, int64_t integer) {
  lists_.push_back(std::move(items));
  return AddNode({kind, static_cast<uint32_t>(lists_.size() - 1), {integer}});
}

void PickleGraph::Append(Id container, std::span<const Id> items) {
  std::vector<Id>& list = lists_[nodes_[container].aux];
  list.insert(list.end(), items.begin(), items.end());
}

std::string_view KindName(PickleGraph::Kind kind) {
  constexpr std::string_view kNames[] = {
      "None",         "a bool",          "an int",     "an int",     "a float",
      "a str",        "bytes",           "a tuple",    "a list",     "a dict",
      "a set",        "a frozenset",     "torch.Size", "a path",     "torch.dtype",
      "torch.layout", "a memory format", "a class",    "an instance"};
  return kNames[static_cast<size_t>(kind)];
}

}  // namespace hsdp_ckpt::format
