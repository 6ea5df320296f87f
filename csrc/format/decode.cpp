// From the unpickler's graph to `Metadata`: each class's fields by name, each field of the type DCP
// gives it.
#include <algorithm>
#include <array>
#include <limits>
#include <unordered_set>

#include "base/error.h"
#include "format/metadata.h"
#include "format/trailer.h"
#include "format/unpickler.h"

namespace hsdp_ckpt::format {
namespace {

using Kind = PickleGraph::Kind;
using Id = PickleGraph::Id;
constexpr Id kAbsent = std::numeric_limits<Id>::max();
constexpr uint64_t kUnknown = std::numeric_limits<uint64_t>::max();
constexpr int kMaxDepth = 200;  // of planner data; DCP's own has a depth of 2

// The way to a value, for messages. Lives on the stack and becomes text only when something is
// wrong: there are millions.
struct Where {
  const Where* parent;
  std::string_view name;
  int64_t index = -1;  // of a list's item

  std::string Text() const {
    const std::string before = parent ? parent->Text() : "";
    if (index >= 0) return before + "[" + std::to_string(index) + "]";
    return before.empty() ? std::string(name) : before + "." + std::string(name);
  }
};

std::string IndexKey(const MetadataIndex& index) {
  // Lengths first, so that no two different indices make one key.
  std::string key = std::to_string(index.fqn.size()) + ":" + index.fqn + (index.offset ? "@" : "");
  for (const int64_t offset : index.offset.value_or(Shape{})) key += std::to_string(offset) + ",";
  return key;
}

class Decoder {
 public:
  Decoder(const PickleGraph& graph, size_t pickle_size, const std::string& path)
      : graph_(graph), path_(path), work_left_(16 * static_cast<uint64_t>(pickle_size) + 1024) {}

  Metadata Run() {
    const Where where{nullptr, "Metadata"};
    const auto [entries, planner, storage, meta, version] = Fields<5>(
        graph_.root(), PickleGlobal::kMetadata, where,
        {"state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"}, 1);
    Metadata metadata;
    DecodeEntries(entries, metadata, {nullptr, "state_dict_metadata"});
    metadata.planner_data = DecodePlain(planner, {nullptr, "planner_data"});
    DecodeStorageData(storage, metadata, {nullptr, "storage_data"});
    DecodeStorageMeta(meta, metadata, {nullptr, "storage_meta"});
    metadata.version = OptionalString(version, {nullptr, "version"});
    return metadata;
  }

 private:
  [[noreturn]] void Fail(const Where& where, std::string_view expected,
                         std::string_view got) const {
    throw base::CorruptionError(path_, where.Text(), std::string(expected), std::string(got));
  }
  // A pickle names a shared value in two bytes, and here each use is a copy: copies are paid for
  // with the pickle's own size. Stock files use about one unit of work in a byte.
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

  // The fields of an instance, in the order of `names`. The first `required` must be there; a field
  // that this code does not know, such as a later torch's, is passed over. Returns kAbsent for what
  // is missing.
  template <size_t N>
  std::array<Id, N> Fields(Id id, PickleGlobal cls, const Where& where,
                           const std::array<std::string_view, N>& names, size_t required) {
    const std::string_view class_name = ClassName(cls);
    if (graph_.kind(id) != Kind::kObject || graph_.integer(id) != static_cast<int64_t>(cls)) {
      Fail(where, class_name, KindName(graph_.kind(id)));
    }
    std::array<Id, N> fields;
    fields.fill(kAbsent);
    const auto state = graph_.items(id);
    const auto items = state.empty() ? state : graph_.items(Expect(state[0], Kind::kDict, where));
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

  // torch.Size, or a tuple or list in its place: all of them numbers of elements, none negative.
  Shape DecodeShape(Id id, const Where& where, bool strides = false) {
    const Kind kind = graph_.kind(id);
    if (kind != Kind::kSize && kind != Kind::kTuple && kind != Kind::kList)
      Fail(where, "torch.Size", KindName(kind));
    const auto items = graph_.items(id);
    Spend(items.size(), where);
    Shape shape;
    shape.reserve(items.size());
    for (const Id item : items) {
      shape.push_back(Int(item, where));
      if (shape.back() < 0 && !strides)
        Fail(where, "no negative number", std::to_string(shape.back()));
    }
    return shape;
  }

  TensorProperties DecodeProperties(Id id, const Where& where) {
    if (graph_.kind(id) != Kind::kObject ||
        graph_.integer(id) != static_cast<int64_t>(PickleGlobal::kTensorProperties) ||
        graph_.items(id).empty()) {
      Fail(where, "TensorProperties with a state", KindName(graph_.kind(id)));
    }
    // Its __getstate__ gives a tuple; torch 2.15 added the strides at the end.
    const auto state = graph_.items(Expect(graph_.items(id)[0], Kind::kTuple, where));
    if (state.size() < 5) Fail(where, "a state of 5 or 6 values", std::to_string(state.size()));
    TensorProperties properties;
    properties.dtype = static_cast<Dtype>(graph_.integer(Expect(state[0], Kind::kDtype, where)));
    properties.layout = static_cast<Layout>(graph_.integer(Expect(state[1], Kind::kLayout, where)));
    properties.requires_grad = Bool(state[2], where);
    properties.memory_format =
        static_cast<MemoryFormat>(graph_.integer(Expect(state[3], Kind::kMemoryFormat, where)));
    properties.pin_memory = Bool(state[4], where);
    if (state.size() > 5 && !IsNone(state[5]))
      properties.strides = DecodeShape(state[5], where, true);
    return properties;
  }

  ChunkMetadata DecodeChunk(Id id, const Shape& size, const Where& where) {
    const auto [offsets, sizes] =
        Fields<2>(id, PickleGlobal::kChunkStorageMetadata, where, {"offsets", "sizes"}, 2);
    ChunkMetadata chunk{DecodeShape(offsets, {&where, "offsets"}),
                        DecodeShape(sizes, {&where, "sizes"})};
    if (chunk.offsets.size() != size.size() || chunk.sizes.size() != size.size()) {
      Fail(where, std::to_string(size.size()) + " dimensions",
           std::to_string(chunk.offsets.size()) + " offsets and " +
               std::to_string(chunk.sizes.size()) + " sizes");
    }
    // An empty chunk may lie anywhere: DTensor puts those of trailing ranks at the tensor's end or
    // beyond.
    if (std::find(chunk.sizes.begin(), chunk.sizes.end(), 0) != chunk.sizes.end()) return chunk;
    for (size_t d = 0; d < size.size(); ++d) {
      if (chunk.offsets[d] > size[d] || chunk.sizes[d] > size[d] - chunk.offsets[d]) {
        Fail(
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
    const auto [properties, size, chunks] = Fields<3>(id, PickleGlobal::kTensorStorageMetadata,
                                                      where, {"properties", "size", "chunks"}, 3);
    TensorMetadata tensor;
    tensor.properties = DecodeProperties(properties, {&where, "properties"});
    tensor.size = DecodeShape(size, {&where, "size"});
    const Where list{&where, "chunks"};
    if (graph_.kind(chunks) != Kind::kTuple) Expect(chunks, Kind::kList, list);
    const auto items = graph_.items(chunks);
    Spend(items.size(), list);
    tensor.chunks.reserve(items.size());
    for (size_t i = 0; i < items.size(); ++i) {
      tensor.chunks.push_back(
          DecodeChunk(items[i], tensor.size, {&list, "", static_cast<int64_t>(i)}));
    }
    return tensor;
  }

  void DecodeEntries(Id id, Metadata& metadata, const Where& where) {
    const auto items = graph_.items(Expect(id, Kind::kDict, where));
    std::unordered_set<std::string_view> names;
    metadata.state_dict_metadata.reserve(items.size() / 2);
    for (size_t i = 0; i < items.size(); i += 2) {
      std::string name = String(items[i], where);
      if (!names.insert(graph_.text(items[i])).second)
        Fail(where, "each name once", "two of " + name);
      const Where entry{&where, name};
      metadata.state_dict_metadata.emplace_back(name, DecodeEntry(items[i + 1], entry));
    }
  }

  MetadataIndex DecodeIndex(Id id, const Where& where) {
    const auto [fqn, offset, hint] =
        Fields<3>(id, PickleGlobal::kMetadataIndex, where, {"fqn", "offset", "index"}, 1);
    MetadataIndex index;
    index.fqn = String(fqn, {&where, "fqn"});
    if (!IsNone(offset)) index.offset = DecodeShape(offset, {&where, "offset"});
    if (!IsNone(hint)) index.index = Int(hint, {&where, "index"});
    return index;
  }

  StorageInfo DecodeStorageInfo(Id id, const Where& where) {
    const auto [path, offset, length, transforms] =
        Fields<4>(id, PickleGlobal::kStorageInfo, where,
                  {"relative_path", "offset", "length", "transform_descriptors"}, 3);
    StorageInfo info;
    info.relative_path = String(path, {&where, "relative_path"});
    if (!IsInsideDirectory(info.relative_path)) {
      Fail({&where, "relative_path"}, "a name inside the checkpoint's directory",
           "'" + info.relative_path + "'");
    }
    info.offset = Int(offset, {&where, "offset"});
    info.length = Int(length, {&where, "length"});
    if (info.offset < 0 || info.length < 0 ||
        info.length > std::numeric_limits<int64_t>::max() - info.offset) {
      Fail(where, "a range of bytes",
           std::to_string(info.length) + " bytes at " + std::to_string(info.offset));
    }
    if (!IsNone(transforms))
      info.transform_descriptors = Strings(transforms, {&where, "transform_descriptors"});
    return info;
  }

  void DecodeStorageData(Id id, Metadata& metadata, const Where& where) {
    if (IsNone(id)) return;
    const auto items = graph_.items(Expect(id, Kind::kDict, where));
    auto& storage = metadata.storage_data.emplace();
    storage.reserve(items.size() / 2);
    std::unordered_set<std::string> seen;
    seen.reserve(items.size() / 2);
    for (size_t i = 0; i < items.size(); i += 2) {
      MetadataIndex index = DecodeIndex(items[i], where);
      if (!seen.insert(IndexKey(index)).second)
        Fail(where, "each chunk once", "two of one chunk of " + index.fqn);
      const Where entry{&where, index.fqn};
      StorageInfo info = DecodeStorageInfo(items[i + 1], entry);
      storage.emplace_back(std::move(index), std::move(info));
    }
  }

  void DecodeStorageMeta(Id id, Metadata& metadata, const Where& where) {
    if (IsNone(id)) return;
    const auto [checkpoint_id, save_id, load_id, modules] =
        Fields<4>(id, PickleGlobal::kStorageMeta, where,
                  {"checkpoint_id", "save_id", "load_id", "modules"}, 0);
    StorageMeta& meta = metadata.storage_meta.emplace();
    if (!IsNone(checkpoint_id)) {
      const Where field{&where, "checkpoint_id"};
      if (graph_.kind(checkpoint_id) == Kind::kPath) {
        auto& path = meta.checkpoint_id.emplace<PathlibPath>();
        path.class_name = graph_.path_class(checkpoint_id);
        for (const Id part : graph_.items(checkpoint_id)) path.parts.push_back(String(part, field));
      } else {
        meta.checkpoint_id = String(checkpoint_id, field);
      }
    }
    meta.save_id = OptionalString(save_id, {&where, "save_id"});
    meta.load_id = OptionalString(load_id, {&where, "load_id"});
    if (!IsNone(modules)) meta.modules = Strings(modules, {&where, "modules"});
  }

  // ---- plain data
  // --------------------------------------------------------------------------------------------------
  PlainData DecodePlain(Id id, const Where& where) {
    PlainData data;
    if (id == kAbsent) {
      data.nodes.emplace_back(PlainData::None{});
      return data;
    }
    plain_ids_.assign(graph_.size(), kAbsent);
    PlainNode(id, data, where, 0);
    return data;
  }

  // A node that Python shares becomes one node here, too, so the work is that of the graph and not
  // of the tree it unfolds to.
  Id PlainNode(Id id, PlainData& data, const Where& where, int depth) {
    constexpr Id kInProgress = kAbsent - 1;
    if (plain_ids_[id] == kInProgress) Fail(where, "plain data", "a value that contains itself");
    if (plain_ids_[id] != kAbsent) return plain_ids_[id];
    if (depth > kMaxDepth) Fail(where, "at most " + std::to_string(kMaxDepth) + " levels", "more");
    plain_ids_[id] = kInProgress;
    PlainData::Node node = PlainValue(id, data, where, depth);
    // A shared value was decoded where it came first, perhaps not as deep: what counts is how deep
    // the finished value is.
    int levels = 0;
    if (const auto* container = std::get_if<PlainData::Container>(&node)) {
      for (const auto item : container->items) levels = std::max(levels, plain_levels_[item] + 1);
    }
    if (levels > kMaxDepth) Fail(where, "at most " + std::to_string(kMaxDepth) + " levels", "more");
    plain_levels_.push_back(levels);
    data.nodes.push_back(std::move(node));
    return plain_ids_[id] = static_cast<Id>(data.nodes.size() - 1);
  }

  PlainData::Node PlainValue(Id id, PlainData& data, const Where& where, int depth) {
    using ContainerKind = PlainData::Kind;
    switch (graph_.kind(id)) {
      case Kind::kNone:
        return PlainData::None{};
      case Kind::kBool:
        return graph_.integer(id) != 0;
      case Kind::kInt:
        return graph_.integer(id);
      case Kind::kBigInt:
        return PlainData::BigInt{std::string(graph_.text(id))};
      case Kind::kFloat:
        return graph_.real(id);
      case Kind::kString:
        return std::string(graph_.text(id));
      case Kind::kBytes:
        return PlainData::Bytes{std::string(graph_.text(id))};
      case Kind::kTuple:
        return PlainContainer(ContainerKind::kTuple, id, data, where, depth);
      case Kind::kList:
        return PlainContainer(ContainerKind::kList, id, data, where, depth);
      case Kind::kDict:
        return PlainContainer(ContainerKind::kDict, id, data, where, depth);
      case Kind::kSet:
        return PlainContainer(ContainerKind::kSet, id, data, where, depth);
      case Kind::kFrozenSet:
        return PlainContainer(ContainerKind::kFrozenSet, id, data, where, depth);
      default:
        Fail(where, "plain data", KindName(graph_.kind(id)));
    }
  }

  PlainData::Node PlainContainer(PlainData::Kind kind, Id id, PlainData& data, const Where& where,
                                 int depth) {
    PlainData::Container container{kind, {}};
    const auto items = graph_.items(id);
    container.items.reserve(items.size());
    for (size_t i = 0; i < items.size(); ++i) {
      const Id item = PlainNode(items[i], data, where, depth + 1);
      const bool key = kind == PlainData::Kind::kDict ? i % 2 == 0 : kind >= PlainData::Kind::kSet;
      if (key) {
        const uint64_t work = HashWork(item, data);
        if (work == 0) Fail(where, "keys that Python can hash", KindName(graph_.kind(items[i])));
        Spend(work, where);
      }
      container.items.push_back(item);
    }
    return container;
  }

  // How many values hashing this one visits: Python unfolds shared tuples every time. 0 if it
  // cannot be hashed. Asked of keys only, whose parts were decoded before them; remembered, so that
  // asking does not unfold anything itself.
  uint64_t HashWork(Id id, const PlainData& data) {
    hash_work_.resize(data.nodes.size(), kUnknown);
    if (hash_work_[id] != kUnknown) return hash_work_[id];
    uint64_t work = 1;
    if (const auto* container = std::get_if<PlainData::Container>(&data.nodes[id])) {
      const bool hashable = container->kind == PlainData::Kind::kTuple ||
                            container->kind == PlainData::Kind::kFrozenSet;
      if (!hashable) work = 0;
      for (size_t i = 0; work != 0 && i < container->items.size(); ++i) {
        const uint64_t item = HashWork(container->items[i], data);
        work = item == 0 ? 0 : std::min(work + item, kUnknown / 4);
      }
    }
    return hash_work_[id] = work;
  }

  const PickleGraph& graph_;
  const std::string& path_;
  uint64_t work_left_;
  std::vector<Id> plain_ids_;
  std::vector<int> plain_levels_;  // of the values below each plain node
  std::vector<uint64_t> hash_work_;
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
