// From the unpickler's graph to `Metadata`: each class's fields by name, each field of the type DCP
// gives it.
#include <algorithm>
#include <limits>
#include <unordered_set>

#include "base/error.h"
#include "format/graph_reader.h"
#include "format/metadata.h"
#include "format/plain_reader.h"
#include "format/trailer.h"
#include "format/unpickler.h"

namespace hsdp_ckpt::format {
namespace {

using Kind = PickleGraph::Kind;
using Id = PickleGraph::Id;

std::string IndexKey(const MetadataIndex& index) {
  // Lengths first, so that no two different indices make one key.
  std::string key = std::to_string(index.fqn.size()) + ":" + index.fqn + (index.offset ? "@" : "");
  for (const int64_t offset : index.offset.value_or(Shape{})) key += std::to_string(offset) + ",";
  return key;
}

class Decoder {
 public:
  Decoder(const PickleGraph& graph, size_t pickle_size, const std::string& path)
      : reader_(graph, pickle_size, path), graph_(graph) {}

  Metadata Run() {
    const Where where{nullptr, "Metadata"};
    const auto [entries, planner, storage, meta, version] = reader_.Fields<5>(
        graph_.root(), PickleGlobal::kMetadata, where,
        {"state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"}, 1);
    Metadata metadata;
    DecodeEntries(entries, metadata, {nullptr, "state_dict_metadata"});
    metadata.planner_data = ReadPlainData(reader_, planner, {nullptr, "planner_data"});
    DecodeStorageData(storage, metadata, {nullptr, "storage_data"});
    DecodeStorageMeta(meta, metadata, {nullptr, "storage_meta"});
    metadata.version = reader_.OptionalString(version, {nullptr, "version"});
    return metadata;
  }

 private:
  TensorProperties DecodeProperties(Id id, const Where& where) {
    if (graph_.kind(id) != Kind::kObject ||
        graph_.integer(id) != static_cast<int64_t>(PickleGlobal::kTensorProperties) ||
        graph_.items(id).empty()) {
      reader_.Fail(where, "TensorProperties with a state", KindName(graph_.kind(id)));
    }
    // Its __getstate__ gives a tuple; torch 2.15 added the strides at the end.
    const auto state = graph_.items(reader_.Expect(graph_.items(id)[0], Kind::kTuple, where));
    if (state.size() < 5)
      reader_.Fail(where, "a state of 5 or 6 values", std::to_string(state.size()));
    TensorProperties properties;
    properties.dtype =
        static_cast<Dtype>(graph_.integer(reader_.Expect(state[0], Kind::kDtype, where)));
    properties.layout =
        static_cast<Layout>(graph_.integer(reader_.Expect(state[1], Kind::kLayout, where)));
    properties.requires_grad = reader_.Bool(state[2], where);
    properties.memory_format = static_cast<MemoryFormat>(
        graph_.integer(reader_.Expect(state[3], Kind::kMemoryFormat, where)));
    properties.pin_memory = reader_.Bool(state[4], where);
    if (state.size() > 5 && !reader_.IsNone(state[5]))
      properties.strides = reader_.Numbers(state[5], where);
    return properties;
  }

  ChunkMetadata DecodeChunk(Id id, const Shape& size, const Where& where) {
    const auto [offsets, sizes] =
        reader_.Fields<2>(id, PickleGlobal::kChunkStorageMetadata, where, {"offsets", "sizes"}, 2);
    ChunkMetadata chunk{reader_.Size(offsets, {&where, "offsets"}),
                        reader_.Size(sizes, {&where, "sizes"})};
    if (chunk.offsets.size() != size.size() || chunk.sizes.size() != size.size()) {
      reader_.Fail(where, std::to_string(size.size()) + " dimensions",
                   std::to_string(chunk.offsets.size()) + " offsets and " +
                       std::to_string(chunk.sizes.size()) + " sizes");
    }
    // An empty chunk may lie anywhere: DTensor puts those of trailing ranks at the tensor's end or
    // beyond.
    if (std::find(chunk.sizes.begin(), chunk.sizes.end(), 0) != chunk.sizes.end()) return chunk;
    for (size_t d = 0; d < size.size(); ++d) {
      if (chunk.offsets[d] > size[d] || chunk.sizes[d] > size[d] - chunk.offsets[d]) {
        reader_.Fail(
            where,
            "a chunk inside dimension " + std::to_string(d) + " of size " + std::to_string(size[d]),
            std::to_string(chunk.sizes[d]) + " at offset " + std::to_string(chunk.offsets[d]));
      }
    }
    return chunk;
  }

  EntryMetadata DecodeEntry(Id id, const Where& where) {
    if (graph_.kind(id) == Kind::kObject &&
        graph_.integer(id) == static_cast<int64_t>(PickleGlobal::kBytesStorageMetadata)) {
      return BytesMetadata{};
    }
    const auto [properties, size, chunks] = reader_.Fields<3>(
        id, PickleGlobal::kTensorStorageMetadata, where, {"properties", "size", "chunks"}, 3);
    TensorMetadata tensor;
    tensor.properties = DecodeProperties(properties, {&where, "properties"});
    tensor.size = reader_.Size(size, {&where, "size"});
    const Where list{&where, "chunks"};
    if (graph_.kind(chunks) != Kind::kTuple) reader_.Expect(chunks, Kind::kList, list);
    const auto items = graph_.items(chunks);
    reader_.Spend(items.size(), list);
    tensor.chunks.reserve(items.size());
    for (size_t i = 0; i < items.size(); ++i) {
      tensor.chunks.push_back(
          DecodeChunk(items[i], tensor.size, {&list, "", static_cast<int64_t>(i)}));
    }
    return tensor;
  }

  void DecodeEntries(Id id, Metadata& metadata, const Where& where) {
    const auto items = graph_.items(reader_.Expect(id, Kind::kDict, where));
    std::unordered_set<std::string_view> names;
    metadata.state_dict_metadata.reserve(items.size() / 2);
    for (size_t i = 0; i < items.size(); i += 2) {
      std::string name = reader_.String(items[i], where);
      if (!names.insert(graph_.text(items[i])).second)
        reader_.Fail(where, "each name once", "two of " + name);
      const Where entry{&where, name};
      metadata.state_dict_metadata.emplace_back(name, DecodeEntry(items[i + 1], entry));
    }
  }

  MetadataIndex DecodeIndex(Id id, const Where& where) {
    const auto [fqn, offset, hint] =
        reader_.Fields<3>(id, PickleGlobal::kMetadataIndex, where, {"fqn", "offset", "index"}, 1);
    MetadataIndex index;
    index.fqn = reader_.String(fqn, {&where, "fqn"});
    if (!reader_.IsNone(offset)) index.offset = reader_.Size(offset, {&where, "offset"});
    if (!reader_.IsNone(hint)) index.index = reader_.Int(hint, {&where, "index"});
    return index;
  }

  StorageInfo DecodeStorageInfo(Id id, const Where& where) {
    const auto [path, offset, length, transforms] =
        reader_.Fields<4>(id, PickleGlobal::kStorageInfo, where,
                          {"relative_path", "offset", "length", "transform_descriptors"}, 3);
    StorageInfo info;
    info.relative_path = reader_.String(path, {&where, "relative_path"});
    if (!IsInsideDirectory(info.relative_path)) {
      reader_.Fail({&where, "relative_path"}, "a name inside the checkpoint's directory",
                   "'" + info.relative_path + "'");
    }
    info.offset = reader_.Int(offset, {&where, "offset"});
    info.length = reader_.Int(length, {&where, "length"});
    if (info.offset < 0 || info.length < 0 ||
        info.length > std::numeric_limits<int64_t>::max() - info.offset) {
      reader_.Fail(where, "a range of bytes",
                   std::to_string(info.length) + " bytes at " + std::to_string(info.offset));
    }
    if (!reader_.IsNone(transforms))
      info.transform_descriptors = reader_.Strings(transforms, {&where, "transform_descriptors"});
    return info;
  }

  void DecodeStorageData(Id id, Metadata& metadata, const Where& where) {
    if (reader_.IsNone(id)) return;
    const auto items = graph_.items(reader_.Expect(id, Kind::kDict, where));
    auto& storage = metadata.storage_data.emplace();
    storage.reserve(items.size() / 2);
    std::unordered_set<std::string> seen;
    seen.reserve(items.size() / 2);
    for (size_t i = 0; i < items.size(); i += 2) {
      MetadataIndex index = DecodeIndex(items[i], where);
      if (!seen.insert(IndexKey(index)).second)
        reader_.Fail(where, "each chunk once", "two of one chunk of " + index.fqn);
      const Where entry{&where, index.fqn};
      StorageInfo info = DecodeStorageInfo(items[i + 1], entry);
      storage.emplace_back(std::move(index), std::move(info));
    }
  }

  void DecodeStorageMeta(Id id, Metadata& metadata, const Where& where) {
    if (reader_.IsNone(id)) return;
    const auto [checkpoint_id, save_id, load_id, modules] =
        reader_.Fields<4>(id, PickleGlobal::kStorageMeta, where,
                          {"checkpoint_id", "save_id", "load_id", "modules"}, 0);
    StorageMeta& meta = metadata.storage_meta.emplace();
    if (!reader_.IsNone(checkpoint_id)) {
      const Where field{&where, "checkpoint_id"};
      if (graph_.kind(checkpoint_id) == Kind::kPath) {
        auto& path = meta.checkpoint_id.emplace<PathlibPath>();
        path.class_name = graph_.path_class(checkpoint_id);
        for (const Id part : graph_.items(checkpoint_id))
          path.parts.push_back(reader_.String(part, field));
      } else {
        meta.checkpoint_id = reader_.String(checkpoint_id, field);
      }
    }
    meta.save_id = reader_.OptionalString(save_id, {&where, "save_id"});
    meta.load_id = reader_.OptionalString(load_id, {&where, "load_id"});
    if (!reader_.IsNone(modules)) meta.modules = reader_.Strings(modules, {&where, "modules"});
  }

  GraphReader reader_;
  const PickleGraph& graph_;
};

}  // namespace

bool IsInsideDirectory(std::string_view relative_path) {
  if (relative_path.empty() || relative_path.find('\0') != std::string_view::npos) return false;
  while (true) {
    const size_t slash = relative_path.find('/');
    const std::string_view part = relative_path.substr(0, slash);
    if (part.empty() || part == "." || part == "..") return false;
    if (slash == std::string_view::npos) return true;
    relative_path.remove_prefix(slash + 1);
  }
}

Metadata DecodeMetadata(std::span<const std::byte> file, const std::string& path) {
  const std::span<const std::byte> pickle = CheckMetadataTrailer(file, path).pickle;
  const PickleGraph graph = Unpickle(pickle, path);
  return Decoder(graph, pickle.size(), path).Run();
}

}  // namespace hsdp_ckpt::format
