// From `Metadata` to a protocol 4 pickle that stock torch loads into an equal one, and our trailer
// behind it.
#include <array>

#include "base/error.h"
#include "format/encoder.h"
#include "format/pickle_writer.h"
#include "format/plain_writer.h"
#include "format/trailer.h"

namespace hsdp_ckpt::format {
namespace {

using pickle::Op;
constexpr std::string_view kDcp = "torch.distributed.checkpoint.metadata";
constexpr std::string_view kFilesystem = "torch.distributed.checkpoint.filesystem";

// Where the memo has the values of an enumeration.
class EnumSlots {
 public:
  EnumSlots() { slots_.fill(kUnsetSlot); }
  template <typename Enum>
  MemoSlot& operator[](Enum value) {
    return slots_[static_cast<uint8_t>(value)];
  }

 private:
  std::array<MemoSlot, 256> slots_;
};

}  // namespace

// Instances are never shared, their classes are.
class MetadataEncoder::Pickler {
 public:
  explicit Pickler(size_t expected) : out_(expected) {
    out_.BeginInstance(metadata_class_, kDcp, "Metadata");
    BeginDict("state_dict_metadata");
  }

  void Entry(std::string_view name, const EntryMetadata& entry) {
    out_.Str(name);
    if (const auto* tensor = std::get_if<TensorMetadata>(&entry)) {
      Tensor(*tensor);
    } else {
      out_.New(bytes_class_, kDcp, "BytesStorageMetadata");
    }
  }
  void Planner(const PlainData& data) {
    EndDict();
    out_.Str("planner_data");
    WritePlainData(out_, data);
  }
  void BeginDict(std::string_view key) {
    EndDict();
    out_.Str(key);
    out_.Put(Op::kEmptyDict);
    out_.Put(Op::kMark);
    in_dict_ = true;
  }
  void BeginRecords() {
    BeginDict("storage_data");
    has_records_ = true;
  }
  void Path(std::string_view name, std::span<const PathPart> path) {
    out_.Str(name);
    if (path.empty()) return out_.Put(Op::kEmptyTuple);
    out_.Put(Op::kMark);
    for (const PathPart& part : path) {
      if (const auto* key = std::get_if<std::string_view>(&part)) {
        out_.Str(*key);
      } else {
        out_.Int(std::get<int64_t>(part));
      }
    }
    out_.Put(Op::kTuple);
  }
  void Index(std::string_view fqn, const std::optional<Shape>& chunk_offset,
             std::optional<int64_t> hint) {
    out_.BeginInstance(index_class_, kDcp, "MetadataIndex");
    out_.Str("fqn");
    out_.Str(fqn);
    out_.Str("index");
    if (hint) {
      out_.Int(*hint);
    } else {
      out_.Put(Op::kNone);
    }
    if (chunk_offset) {
      out_.Str("offset");
      out_.Size(*chunk_offset);
    }
    out_.EndInstance();
  }
  void Place(std::string_view relative_path, int64_t offset, int64_t length,
             const std::optional<std::vector<std::string>>& transform_descriptors) {
    out_.BeginInstance(info_class_, kFilesystem, "_StorageInfo");
    out_.Str("relative_path");
    out_.Str(relative_path);
    out_.Str("offset");
    out_.Int(offset);
    out_.Str("length");
    out_.Int(length);
    if (transform_descriptors) {
      out_.Str("transform_descriptors");
      out_.StrList(*transform_descriptors);
    }
    out_.EndInstance();
  }
  std::string Finish(const std::optional<StorageMeta>& meta,
                     const std::optional<std::string>& version) {
    EndDict();
    if (!has_records_) {
      out_.Str("storage_data");
      out_.Put(Op::kNone);
    }
    out_.Str("storage_meta");
    if (meta) {
      Storage(*meta);
    } else {
      out_.Put(Op::kNone);
    }
    out_.Str("version");
    out_.OptionalStr(version);
    out_.EndInstance();
    std::string file = out_.Finish();
    file += MetadataTrailer(std::as_bytes(std::span(file)));
    return file;
  }

 private:
  void EndDict() {
    if (in_dict_) out_.Put(Op::kSetItems);
    in_dict_ = false;
  }

  void Tensor(const TensorMetadata& tensor) {
    out_.BeginInstance(tensor_class_, kDcp, "TensorStorageMetadata");
    out_.Str("properties");
    Properties(tensor.properties);
    out_.Str("size");
    out_.Size(tensor.size);
    out_.Str("chunks");
    out_.Put(Op::kEmptyList);
    out_.Put(Op::kMark);
    for (const ChunkMetadata& chunk : tensor.chunks) {
      out_.BeginInstance(chunk_class_, kDcp, "ChunkStorageMetadata");
      out_.Str("offsets");
      out_.Size(chunk.offsets);
      out_.Str("sizes");
      out_.Size(chunk.sizes);
      out_.EndInstance();
    }
    out_.Put(Op::kAppends);
    out_.EndInstance();
  }

  void Properties(const TensorProperties& properties) {
    out_.New(properties_class_, kDcp, "TensorProperties");
    out_.Put(Op::kMark);
    out_.Global(dtypes_[properties.dtype], "torch", Name(properties.dtype));
    LayoutOf(properties.layout);
    out_.Bool(properties.requires_grad);
    Format(properties.memory_format);
    out_.Bool(properties.pin_memory);
    // Five values are what every version of torch reads; only 2.15 and later know a sixth.
    if (properties.strides) out_.Tuple(*properties.strides);
    out_.Put(Op::kTuple);
    out_.Put(Op::kBuild);
  }
  void LayoutOf(Layout layout) {
    MemoSlot& slot = layouts_[layout];
    if (out_.Recall(slot)) return;
    out_.Global(get_layout_, "torch.serialization", "_get_layout");
    out_.NewStr("torch." + std::string(Name(layout)));
    out_.Put(Op::kTuple1);
    out_.Put(Op::kReduce);
    out_.Memoize(slot);
  }
  void Format(MemoryFormat format) {
    MemoSlot& slot = formats_[format];
    if (out_.Recall(slot)) return;
    out_.Global(format_class_, kDcp, "_MEM_FORMAT_ENCODING");
    out_.Int(static_cast<int64_t>(format));
    out_.Put(Op::kTuple1);
    out_.Put(Op::kReduce);
    out_.Memoize(slot);
  }

  void Storage(const StorageMeta& meta) {
    out_.BeginInstance(storage_meta_class_, kDcp, "StorageMeta");
    out_.Str("checkpoint_id");
    if (const auto* text = std::get_if<std::string>(&meta.checkpoint_id)) {
      out_.Str(*text);
    } else if (const auto* path = std::get_if<PathlibPath>(&meta.checkpoint_id)) {
      out_.Global("pathlib", path->class_name);
      out_.Put(Op::kMark);
      for (const std::string& part : path->parts) out_.Str(part);
      out_.Put(Op::kTuple);
      out_.Put(Op::kReduce);
    } else {
      out_.Put(Op::kNone);
    }
    out_.Str("save_id");
    out_.OptionalStr(meta.save_id);
    out_.Str("load_id");
    out_.OptionalStr(meta.load_id);
    out_.Str("modules");
    out_.StrList(meta.modules);
    out_.EndInstance();
  }

  PickleWriter out_;
  bool in_dict_ = false;  // whether items of one of the Metadata's own dicts are being written
  bool has_records_ = false;
  MemoSlot metadata_class_ = kUnsetSlot;
  MemoSlot tensor_class_ = kUnsetSlot;
  MemoSlot bytes_class_ = kUnsetSlot;
  MemoSlot chunk_class_ = kUnsetSlot;
  MemoSlot properties_class_ = kUnsetSlot;
  MemoSlot index_class_ = kUnsetSlot;
  MemoSlot storage_meta_class_ = kUnsetSlot;
  MemoSlot info_class_ = kUnsetSlot;
  MemoSlot get_layout_ = kUnsetSlot;
  MemoSlot format_class_ = kUnsetSlot;
  EnumSlots dtypes_, layouts_, formats_;
};

MetadataEncoder::MetadataEncoder(size_t expected) : pickler_(std::make_unique<Pickler>(expected)) {}
MetadataEncoder::~MetadataEncoder() = default;
void MetadataEncoder::Entry(std::string_view name, const EntryMetadata& entry) {
  pickler_->Entry(name, entry);
}
void MetadataEncoder::PlannerData(const PlainData& data) { pickler_->Planner(data); }
void MetadataEncoder::BeginPaths() { pickler_->BeginDict("planner_data"); }
void MetadataEncoder::Path(std::string_view name, std::span<const PathPart> path) {
  pickler_->Path(name, path);
}
void MetadataEncoder::BeginRecords() { pickler_->BeginRecords(); }
void MetadataEncoder::Record(std::string_view fqn, const std::optional<Shape>& chunk_offset,
                             std::optional<int64_t> hint, std::string_view relative_path,
                             int64_t offset, int64_t length,
                             const std::optional<std::vector<std::string>>& transform_descriptors) {
  if (!IsInsideDirectory(relative_path) || offset < 0 || length < 0) {
    throw base::Error(std::string(fqn) + ": " + std::to_string(length) + " bytes at " +
                      std::to_string(offset) + " of '" + std::string(relative_path) +
                      "' are no place inside a checkpoint's directory");
  }
  pickler_->Index(fqn, chunk_offset, hint);
  pickler_->Place(relative_path, offset, length, transform_descriptors);
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
