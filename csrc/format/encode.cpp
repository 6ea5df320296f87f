// From `Metadata` to a protocol 4 pickle that stock torch loads into an equal one, and our trailer
// behind it.
#include <algorithm>
#include <array>
#include <bit>
#include <functional>
#include <unordered_map>

#include "base/error.h"
#include "format/encoder.h"
#include "format/trailer.h"
#include "pickle/opcodes.h"

namespace hsdp_ckpt::format {
namespace {

constexpr uint32_t kUnset = UINT32_MAX;
constexpr int kMaxDepth = 200;  // the decoder's
constexpr std::string_view kDcp = "torch.distributed.checkpoint.metadata";
constexpr size_t kFrameSize = 8,
                 kHeader = 3 + kFrameSize;  // bytes: of a frame's length, and before its first one

struct ShapeHash {
  size_t operator()(const Shape& shape) const {
    uint64_t hash = shape.size();
    for (const int64_t number : shape)
      hash = std::rotl(hash ^ static_cast<uint64_t>(number), 23) * 0x9E3779B97F4A7C15u;
    return hash;
  }
};

// Texts by the order in which they came, those that come again found in a table of one block: there
// are two of a tensor, and a node for each would be three times as large.
class TextTable {
 public:
  // The number under which the text is remembered: kUnset at first, the caller's to set.
  uint32_t& operator[](std::string_view text) {
    if (slots_.size() < 2 * (used_ + 1)) Grow();
    Slot& slot = Find(text);
    if (slot.data == nullptr) {
      slot = {text.data(), static_cast<uint32_t>(text.size()), kUnset};
      ++used_;
    }
    return slot.number;
  }

 private:
  struct Slot {
    const char* data = nullptr;  // of none
    uint32_t size = 0;
    uint32_t number = kUnset;
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

}  // namespace

// Strings and shapes come back many times (a chunk's offsets are also its key's) and cannot be
// changed by whoever loads them, so each is written once and named after that: the file shrinks,
// and stock's load has fewer calls to make. Instances are never shared.
class MetadataEncoder::Pickler {
 public:
  explicit Pickler(size_t expected) {
    out_.reserve(expected);
    out_.assign({'\x80', '\x04', static_cast<char>(pickle::Op::kFrame)});
    out_.append(kFrameSize, '\0');
    Instance(kMetadata, kDcp, "Metadata");
    BeginDict("state_dict_metadata");
  }

  void Entry(std::string_view name, const EntryMetadata& entry) {
    Str(name);
    Entry(entry);
  }
  void PlannerData(const PlainData& data) {
    EndDict();
    Key("planner_data");
    Plain(data);
  }
  void BeginDict(std::string_view key) {
    EndDict();
    Key(key);
    Put(pickle::Op::kEmptyDict);
    Put(pickle::Op::kMark);
    in_dict_ = true;
  }
  void BeginRecords() {
    BeginDict("storage_data");
    has_records_ = true;
  }
  void Path(std::string_view name, std::span<const PathPart> path) {
    Str(name);
    if (path.empty()) return Put(pickle::Op::kEmptyTuple);
    Put(pickle::Op::kMark);
    for (const PathPart& part : path) {
      if (const auto* key = std::get_if<std::string_view>(&part)) {
        Str(*key);
      } else {
        Int(std::get<int64_t>(part));
      }
    }
    Put(pickle::Op::kTuple);
  }
  void Record(std::string_view fqn, const std::optional<Shape>& chunk_offset,
              std::optional<int64_t> hint, std::string_view relative_path, int64_t offset,
              int64_t length,
              const std::optional<std::vector<std::string>>& transform_descriptors) {
    if (!IsInsideDirectory(relative_path) || offset < 0 || length < 0) {
      throw base::Error(std::string(fqn) + ": " + std::to_string(length) + " bytes at " +
                        std::to_string(offset) + " of '" + std::string(relative_path) +
                        "' are no place inside a checkpoint's directory");
    }
    Instance(kIndex, kDcp, "MetadataIndex");
    Key("fqn");
    Str(fqn);
    Key("index");
    if (hint) {
      Int(*hint);
    } else {
      Put(pickle::Op::kNone);
    }
    if (chunk_offset) {
      Key("offset");
      Size(*chunk_offset);
    }
    EndInstance();
    Instance(kInfo, "torch.distributed.checkpoint.filesystem", "_StorageInfo");
    Key("relative_path");
    Str(relative_path);
    Key("offset");
    Int(offset);
    Key("length");
    Int(length);
    if (transform_descriptors) {
      Key("transform_descriptors");
      StrList(*transform_descriptors);
    }
    EndInstance();
  }
  std::string Finish(const std::optional<StorageMeta>& meta,
                     const std::optional<std::string>& version) {
    EndDict();
    if (!has_records_) {
      Key("storage_data");
      Put(pickle::Op::kNone);
    }
    Key("storage_meta");
    WriteStorageMeta(meta);
    Key("version");
    OptionalStr(version);
    EndInstance();
    Put(pickle::Op::kStop);
    // One frame around everything, so that an unpickler reads the file in one go.
    const size_t size = out_.size() - kHeader;
    for (size_t i = 0; i < kFrameSize; ++i)
      out_[kHeader - kFrameSize + i] = static_cast<char>(size >> (8 * i));
    out_ += MetadataTrailer(std::as_bytes(std::span(out_)));
    return std::move(out_);
  }

 private:
  enum Slot {
    kMetadata,
    kTensor,
    kBytes,
    kChunk,
    kProperties,
    kIndex,
    kMeta,
    kInfo,
    kSize,
    kGetLayout,
    kEncoding,
    kSlots
  };

  void EndDict() {
    if (in_dict_) Put(pickle::Op::kSetItems);
    in_dict_ = false;
  }
  void Put(pickle::Op op) { out_.push_back(static_cast<char>(op)); }
  void Bytes(uint64_t value, int count) {
    for (int i = 0; i < count; ++i) out_.push_back(static_cast<char>(value >> (8 * i)));
  }
  void Memoize(uint32_t& slot) {
    Put(pickle::Op::kMemoize);
    slot = memo_count_++;
  }
  // Writes what the memo has under `slot`; false if it has nothing yet.
  bool Get(uint32_t slot) {
    if (slot == kUnset) return false;
    Put(slot < 256 ? pickle::Op::kBinGet : pickle::Op::kLongBinGet);
    Bytes(slot, slot < 256 ? 1 : 4);
    return true;
  }

  // ---- values
  // ------------------------------------------------------------------------------------------------------
  void Text(std::string_view text, pickle::Op one_byte, pickle::Op four_bytes,
            pickle::Op eight_bytes) {
    const bool is_short = text.size() < 256, is_medium = text.size() <= UINT32_MAX;
    Put(is_short ? one_byte : is_medium ? four_bytes : eight_bytes);
    Bytes(text.size(), is_short ? 1 : is_medium ? 4 : 8);
    out_.append(text);
  }
  void Str(std::string_view text) {
    if (text.size() > UINT32_MAX)
      throw base::Error("metadata: a text of " + std::to_string(text.size()) + " bytes");
    uint32_t& slot = strings_[text];
    if (Get(slot)) return;
    Text(text, pickle::Op::kShortBinUnicode, pickle::Op::kBinUnicode, pickle::Op::kBinUnicode8);
    Memoize(slot);
  }
  void Key(std::string_view name) { Str(name); }
  void OptionalStr(const std::optional<std::string>& text) {
    if (text) {
      Str(*text);
    } else {
      Put(pickle::Op::kNone);
    }
  }
  void Bool(bool value) { Put(value ? pickle::Op::kNewTrue : pickle::Op::kNewFalse); }
  void Int(int64_t value) {
    if (value >= 0 && value < 256) {
      Put(pickle::Op::kBinInt1);
      Bytes(static_cast<uint64_t>(value), 1);
    } else if (value >= 0 && value < 65536) {
      Put(pickle::Op::kBinInt2);
      Bytes(static_cast<uint64_t>(value), 2);
    } else if (value >= INT32_MIN && value <= INT32_MAX) {
      Put(pickle::Op::kBinInt);
      Bytes(static_cast<uint64_t>(value), 4);
    } else {
      Put(pickle::Op::kLong1);
      Bytes(8, 1);
      Bytes(static_cast<uint64_t>(value), 8);
    }
  }
  void Float(double value) {
    Put(pickle::Op::kBinFloat);
    const auto bits = std::bit_cast<uint64_t>(value);
    for (int shift = 56; shift >= 0; shift -= 8) out_.push_back(static_cast<char>(bits >> shift));
  }
  void Global(Slot slot, std::string_view module, std::string_view name) {
    if (Get(globals_[slot])) return;
    Global(module, name);
    Memoize(globals_[slot]);
  }
  void Global(std::string_view module, std::string_view name) {
    Str(module);
    Str(name);
    Put(pickle::Op::kStackGlobal);
  }
  void Tuple(const Shape& numbers) {
    constexpr pickle::Op kShort[] = {pickle::Op::kEmptyTuple, pickle::Op::kTuple1,
                                     pickle::Op::kTuple2, pickle::Op::kTuple3};
    const bool is_short = numbers.size() < std::size(kShort);
    if (!is_short) Put(pickle::Op::kMark);
    for (const int64_t number : numbers) Int(number);
    Put(is_short ? kShort[numbers.size()] : pickle::Op::kTuple);
  }
  void Size(const Shape& shape) {
    uint32_t& slot = shapes_.try_emplace(shape, kUnset).first->second;
    if (Get(slot)) return;
    Global(kSize, "torch", "Size");
    Tuple(shape);
    Put(pickle::Op::kTuple1);
    Put(pickle::Op::kReduce);
    Memoize(slot);
  }
  void StrList(const std::vector<std::string>& strings) {
    Put(pickle::Op::kEmptyList);
    Put(pickle::Op::kMark);
    for (const std::string& string : strings) Str(string);
    Put(pickle::Op::kAppends);
  }

  // ---- classes
  // -----------------------------------------------------------------------------------------------------
  void New(Slot slot, std::string_view module, std::string_view name) {
    Global(slot, module, name);
    Put(pickle::Op::kEmptyTuple);
    Put(pickle::Op::kNewObj);
  }
  // An instance whose state is a dict; its keys and values follow, then EndInstance.
  void Instance(Slot slot, std::string_view module, std::string_view name) {
    New(slot, module, name);
    Put(pickle::Op::kEmptyDict);
    Put(pickle::Op::kMark);
  }
  void EndInstance() {
    Put(pickle::Op::kSetItems);
    Put(pickle::Op::kBuild);
  }

  void Properties(const TensorProperties& properties) {
    New(kProperties, kDcp, "TensorProperties");
    Put(pickle::Op::kMark);
    uint32_t& dtype = dtypes_[static_cast<uint8_t>(properties.dtype)];
    if (!Get(dtype)) {
      Global("torch", Name(properties.dtype));
      Memoize(dtype);
    }
    uint32_t& layout = layouts_[static_cast<uint8_t>(properties.layout)];
    if (!Get(layout)) {
      Global(kGetLayout, "torch.serialization", "_get_layout");
      Text("torch." + std::string(Name(properties.layout)), pickle::Op::kShortBinUnicode,
           pickle::Op::kBinUnicode, pickle::Op::kBinUnicode8);
      Put(pickle::Op::kTuple1);
      Put(pickle::Op::kReduce);
      Memoize(layout);
    }
    Bool(properties.requires_grad);
    uint32_t& format = formats_[static_cast<uint8_t>(properties.memory_format)];
    if (!Get(format)) {
      Global(kEncoding, kDcp, "_MEM_FORMAT_ENCODING");
      Int(static_cast<int64_t>(properties.memory_format));
      Put(pickle::Op::kTuple1);
      Put(pickle::Op::kReduce);
      Memoize(format);
    }
    Bool(properties.pin_memory);
    // Five values are what every version of torch reads; only 2.15 and later know a sixth.
    if (properties.strides) Tuple(*properties.strides);
    Put(pickle::Op::kTuple);
    Put(pickle::Op::kBuild);
  }

  void Entry(const EntryMetadata& entry) {
    const auto* tensor = std::get_if<TensorMetadata>(&entry);
    if (!tensor) return New(kBytes, kDcp, "BytesStorageMetadata");
    Instance(kTensor, kDcp, "TensorStorageMetadata");
    Key("properties");
    Properties(tensor->properties);
    Key("size");
    Size(tensor->size);
    Key("chunks");
    Put(pickle::Op::kEmptyList);
    Put(pickle::Op::kMark);
    for (const ChunkMetadata& chunk : tensor->chunks) {
      Instance(kChunk, kDcp, "ChunkStorageMetadata");
      Key("offsets");
      Size(chunk.offsets);
      Key("sizes");
      Size(chunk.sizes);
      EndInstance();
    }
    Put(pickle::Op::kAppends);
    EndInstance();
  }

  void WriteStorageMeta(const std::optional<StorageMeta>& meta) {
    if (!meta) return Put(pickle::Op::kNone);
    Instance(kMeta, kDcp, "StorageMeta");
    Key("checkpoint_id");
    if (const auto* text = std::get_if<std::string>(&meta->checkpoint_id)) {
      Str(*text);
    } else if (const auto* path = std::get_if<PathlibPath>(&meta->checkpoint_id)) {
      Global("pathlib", path->class_name);
      Put(pickle::Op::kMark);
      for (const std::string& part : path->parts) Str(part);
      Put(pickle::Op::kTuple);
      Put(pickle::Op::kReduce);
    } else {
      Put(pickle::Op::kNone);
    }
    Key("save_id");
    OptionalStr(meta->save_id);
    Key("load_id");
    OptionalStr(meta->load_id);
    Key("modules");
    StrList(meta->modules);
    EndInstance();
  }

  // ---- plain data
  // --------------------------------------------------------------------------------------------------
  void Plain(const PlainData& data) {
    if (data.nodes.empty()) return Put(pickle::Op::kNone);
    plain_slots_.assign(data.nodes.size(), kUnset);
    std::vector<uint8_t>& shared = plain_shared_;
    shared.assign(data.nodes.size(), 0);
    for (size_t id = 0; id < data.nodes.size(); ++id) {
      const auto* container = std::get_if<PlainData::Container>(&data.nodes[id]);
      if (!container) continue;
      for (const PlainData::Id item : container->items) {
        if (item >= id)
          throw base::Error(
              "planner data: a value that does not come before the one it is part of");
        if (shared[item] < 2) ++shared[item];
      }
    }
    PlainNode(data, static_cast<PlainData::Id>(data.nodes.size() - 1), 0);
  }

  void PlainNode(const PlainData& data, PlainData::Id id, int depth) {
    if (depth > kMaxDepth)
      throw base::Error("planner data: more than " + std::to_string(kMaxDepth) + " levels");
    if (Get(plain_slots_[id])) return;
    struct Visitor {
      Pickler& self;
      const PlainData& data;
      int depth;
      void operator()(PlainData::None) const { self.Put(pickle::Op::kNone); }
      void operator()(bool value) const { self.Bool(value); }
      void operator()(int64_t value) const { self.Int(value); }
      void operator()(double value) const { self.Float(value); }
      void operator()(const std::string& value) const { self.Str(value); }
      void operator()(const PlainData::Bytes& bytes) const {
        self.Text(bytes.value, pickle::Op::kShortBinBytes, pickle::Op::kBinBytes,
                  pickle::Op::kBinBytes8);
      }
      void operator()(const PlainData::BigInt& big) const {
        const size_t size = big.two_complement.size();
        if (size > INT32_MAX)
          throw base::Error("planner data: an integer of " + std::to_string(size) + " bytes");
        self.Put(size < 256 ? pickle::Op::kLong1 : pickle::Op::kLong4);
        self.Bytes(size, size < 256 ? 1 : 4);
        self.out_.append(big.two_complement);
      }
      void operator()(const PlainData::Container& container) const {
        self.PlainContainer(data, container, depth);
      }
    };
    std::visit(Visitor{*this, data, depth}, data.nodes[id]);
    const bool is_container = std::holds_alternative<PlainData::Container>(data.nodes[id]);
    if (is_container && plain_shared_[id] > 1) Memoize(plain_slots_[id]);
  }

  void PlainContainer(const PlainData& data, const PlainData::Container& container, int depth) {
    using Kind = PlainData::Kind;
    const auto items = [&](pickle::Op end) {
      Put(pickle::Op::kMark);
      for (const PlainData::Id item : container.items) PlainNode(data, item, depth + 1);
      Put(end);
    };
    switch (container.kind) {
      case Kind::kTuple:
        if (container.items.empty()) return Put(pickle::Op::kEmptyTuple);
        return items(pickle::Op::kTuple);
      case Kind::kList:
        Put(pickle::Op::kEmptyList);
        return items(pickle::Op::kAppends);
      case Kind::kDict:
        Put(pickle::Op::kEmptyDict);
        return items(pickle::Op::kSetItems);
      case Kind::kSet:
        Put(pickle::Op::kEmptySet);
        return items(pickle::Op::kAddItems);
      case Kind::kFrozenSet:
        return items(pickle::Op::kFrozenSet);
    }
  }

  template <size_t N>
  static constexpr std::array<uint32_t, N> Unset() {
    std::array<uint32_t, N> slots;
    slots.fill(kUnset);
    return slots;
  }

  std::string out_;
  bool in_dict_ = false;  // whose items are being written, of the Metadata's own
  bool has_records_ = false;
  uint32_t memo_count_ = 0;
  TextTable strings_;  // views into what was given, and into literals
  std::unordered_map<Shape, uint32_t, ShapeHash> shapes_;
  std::array<uint32_t, kSlots> globals_ = Unset<kSlots>();
  std::array<uint32_t, 256> dtypes_ = Unset<256>();
  std::array<uint32_t, 256> layouts_ = Unset<256>();
  std::array<uint32_t, 256> formats_ = Unset<256>();
  std::vector<uint32_t> plain_slots_;
  std::vector<uint8_t> plain_shared_;
};

MetadataEncoder::MetadataEncoder(size_t expected) : pickler_(std::make_unique<Pickler>(expected)) {}
MetadataEncoder::~MetadataEncoder() = default;
void MetadataEncoder::Entry(std::string_view name, const EntryMetadata& entry) {
  pickler_->Entry(name, entry);
}
void MetadataEncoder::PlannerData(const PlainData& data) { pickler_->PlannerData(data); }
void MetadataEncoder::BeginPaths() { pickler_->BeginDict("planner_data"); }
void MetadataEncoder::Path(std::string_view name, std::span<const PathPart> path) {
  pickler_->Path(name, path);
}
void MetadataEncoder::BeginRecords() { pickler_->BeginRecords(); }
void MetadataEncoder::Record(std::string_view fqn, const std::optional<Shape>& chunk_offset,
                             std::optional<int64_t> hint, std::string_view relative_path,
                             int64_t offset, int64_t length,
                             const std::optional<std::vector<std::string>>& transform_descriptors) {
  pickler_->Record(fqn, chunk_offset, hint, relative_path, offset, length, transform_descriptors);
}
std::string MetadataEncoder::Finish(const std::optional<StorageMeta>& meta,
                                    const std::optional<std::string>& version) {
  return pickler_->Finish(meta, version);
}

std::string EncodeMetadata(const Metadata& metadata) {
  MetadataEncoder encoder;
  for (const auto& [name, entry] : metadata.state_dict_metadata) encoder.Entry(name, entry);
  encoder.PlannerData(metadata.planner_data);
  if (metadata.storage_data) {
    encoder.BeginRecords();
    for (const auto& [index, info] : *metadata.storage_data) {
      encoder.Record(index.fqn, index.offset, index.index, info.relative_path, info.offset,
                     info.length, info.transform_descriptors);
    }
  }
  return encoder.Finish(metadata.storage_meta, metadata.version);
}

}  // namespace hsdp_ckpt::format
