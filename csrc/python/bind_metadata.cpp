// `Metadata` to DCP's Python classes. The instances are made as an unpickler makes them: without
// __init__, fields set one by one, also on the frozen MetadataIndex. Plain C API, for there may be
// millions.
#include <set>
#include <string>

#include "checkpoint/load/metadata_file.h"
#include "format/metadata.h"
#include "format/trailer.h"
#include "pickle/pickle_strings.h"
#include "python/dcp_types.h"
#include "python/metadata_from_python.h"
#include "python/metadata_to_python.h"
#include "python/module.h"

namespace py = pybind11;

namespace hsdp_ckpt::python {
namespace {

std::span<const std::byte> Span(const py::buffer_info& view) {
  if (view.ndim != 1 || view.strides[0] != view.itemsize)
    throw py::value_error("a buffer that is not contiguous");
  return {static_cast<const std::byte*>(view.ptr), static_cast<size_t>(view.size * view.itemsize)};
}

py::object Steal(PyObject* object) {
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

py::object Str(std::string_view text) {
  return Steal(
      PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "surrogatepass"));
}
py::object Int(int64_t value) { return Steal(PyLong_FromLongLong(value)); }
py::object OptionalStr(const std::optional<std::string>& text) {
  return text ? Str(*text) : py::none();
}

// The cycle collector would go over the growing heap again and again, and nothing made here is
// garbage.
class CollectorPause {
 public:
  CollectorPause() : was_enabled_(PyGC_Disable() != 0) {}
  ~CollectorPause() {
    if (was_enabled_) PyGC_Enable();
  }
  CollectorPause(const CollectorPause&) = delete;
  CollectorPause& operator=(const CollectorPause&) = delete;

 private:
  bool was_enabled_;
};

class PythonMetadata : DcpTypes {
 public:
  py::object Make(const format::Metadata& metadata) {
    py::dict entries;
    for (const auto& [name, entry] : metadata.state_dict_metadata)
      Put(entries, Str(name), Entry(entry));
    const py::object result = New(metadata_);
    Set(result, state_dict_metadata_, entries);
    Set(result, planner_data_, Plain(metadata.planner_data));
    Set(result, storage_data_,
        metadata.storage_data ? StorageData(*metadata.storage_data) : py::none());
    Set(result, storage_meta_,
        metadata.storage_meta ? MakeStorageMeta(*metadata.storage_meta) : py::none());
    Set(result, version_, OptionalStr(metadata.version));
    return result;
  }

 private:
  py::object New(const py::object& cls) const {
    auto* type = reinterpret_cast<PyTypeObject*>(cls.ptr());
    return Steal(type->tp_new(type, no_arguments_.ptr(), nullptr));
  }
  // Past the frozen class's own __setattr__, into the instance's __dict__.
  static void Set(const py::object& object, const py::str& name, const py::object& value) {
    if (PyObject_GenericSetAttr(object.ptr(), name.ptr(), value.ptr()) != 0)
      throw py::error_already_set();
  }
  static void Put(const py::dict& dict, const py::object& key, const py::object& value) {
    if (PyDict_SetItem(dict.ptr(), key.ptr(), value.ptr()) != 0) throw py::error_already_set();
  }

  py::object Numbers(const format::Shape& shape, const py::object& cls) const {
    auto* type = reinterpret_cast<PyTypeObject*>(cls.ptr());  // tuple, or torch.Size, which is one
    py::object numbers = Steal(type->tp_alloc(type, static_cast<Py_ssize_t>(shape.size())));
    for (size_t i = 0; i < shape.size(); ++i) {
      PyTuple_SET_ITEM(numbers.ptr(), static_cast<Py_ssize_t>(i), Int(shape[i]).release().ptr());
    }
    return numbers;
  }
  py::object Size(const format::Shape& shape) const { return Numbers(shape, size_); }

  py::object Properties(const format::TensorProperties& properties) const {
    const py::object result = New(tensor_properties_);
    const std::string dtype(format::Name(properties.dtype)),
        layout(format::Name(properties.layout));
    Set(result, dtype_, torch_.attr(dtype.c_str()));
    Set(result, layout_, torch_.attr(layout.c_str()));
    Set(result, requires_grad_, py::bool_(properties.requires_grad));
    Set(result, memory_format_, memory_formats_[static_cast<size_t>(properties.memory_format)]);
    Set(result, pin_memory_, py::bool_(properties.pin_memory));
    // A torch that does not know the field would not compare it, nor write it again.
    if (knows_strides_)
      Set(result, strides_, properties.strides ? Tuple(*properties.strides) : py::none());
    return result;
  }
  py::object Tuple(const format::Shape& shape) const {
    py::tuple numbers(shape.size());
    for (size_t i = 0; i < shape.size(); ++i) numbers[i] = Int(shape[i]);
    return numbers;
  }

  py::object Entry(const format::EntryMetadata& entry) const {
    const auto* tensor = std::get_if<format::TensorMetadata>(&entry);
    if (!tensor) return New(bytes_);
    py::list chunks(tensor->chunks.size());
    for (size_t i = 0; i < tensor->chunks.size(); ++i) {
      const py::object chunk = New(chunk_);
      Set(chunk, offsets_, Size(tensor->chunks[i].offsets));
      Set(chunk, sizes_, Size(tensor->chunks[i].sizes));
      PyList_SET_ITEM(chunks.ptr(), static_cast<Py_ssize_t>(i), py::object(chunk).release().ptr());
    }
    const py::object result = New(tensor_);
    Set(result, properties_, Properties(tensor->properties));
    Set(result, size_name_, Size(tensor->size));
    Set(result, chunks_, chunks);
    return result;
  }

  py::object StorageData(
      const std::vector<std::pair<format::MetadataIndex, format::StorageInfo>>& storage) const {
    py::dict result;
    for (const auto& [index, info] : storage) {
      const py::object key = New(index_);
      Set(key, fqn_, Str(index.fqn));
      Set(key, index_name_, index.index ? Int(*index.index) : py::none());
      if (index.offset) Set(key, offset_, Size(*index.offset));
      const py::object value = New(storage_info_);
      Set(value, relative_path_, Str(info.relative_path));
      Set(value, offset_, Int(info.offset));
      Set(value, length_, Int(info.length));
      if (info.transform_descriptors)
        Set(value, transform_descriptors_, Strings(*info.transform_descriptors));
      Put(result, key, value);
    }
    return result;
  }

  static py::object Strings(const std::vector<std::string>& strings) {
    py::list result;
    for (const std::string& string : strings) result.append(Str(string));
    return result;
  }

  py::object MakeStorageMeta(const format::StorageMeta& meta) const {
    const py::object result = New(storage_meta_class_);
    py::object checkpoint_id = py::none();
    if (const auto* text = std::get_if<std::string>(&meta.checkpoint_id))
      checkpoint_id = Str(*text);
    if (const auto* path = std::get_if<format::PathlibPath>(&meta.checkpoint_id)) {
      // Another system's path can only be made as a pure one.
      const std::string name =
          path->class_name == "WindowsPath" ? "PureWindowsPath" : path->class_name;
      checkpoint_id =
          py::module_::import("pathlib").attr(name.c_str())(*py::tuple(Strings(path->parts)));
    }
    Set(result, checkpoint_id_, checkpoint_id);
    Set(result, save_id_, OptionalStr(meta.save_id));
    Set(result, load_id_, OptionalStr(meta.load_id));
    Set(result, modules_, Strings(meta.modules));
    return result;
  }

  // Children come before their parents, and a shared node becomes one shared object.
  static py::object Plain(const format::PlainData& data) {
    std::vector<py::object> objects;
    objects.reserve(data.nodes.size());
    for (const format::PlainData::Node& node : data.nodes) {
      objects.push_back(
          std::visit([&](const auto& value) { return PlainObject(value, objects); }, node));
    }
    return objects.back();
  }
  using Objects = std::vector<py::object>;
  static py::object PlainObject(format::PlainData::None, const Objects&) { return py::none(); }
  static py::object PlainObject(bool value, const Objects&) { return py::bool_(value); }
  static py::object PlainObject(int64_t value, const Objects&) { return Int(value); }
  static py::object PlainObject(double value, const Objects&) { return py::float_(value); }
  static py::object PlainObject(const std::string& value, const Objects&) { return Str(value); }
  static py::object PlainObject(const format::PlainData::Bytes& bytes, const Objects&) {
    return py::bytes(bytes.value);
  }
  static py::object PlainObject(const format::PlainData::BigInt& big, const Objects&) {
    const auto from_bytes = py::type::of(Int(0)).attr("from_bytes");
    return from_bytes(py::bytes(big.two_complement), "little", py::arg("signed") = true);
  }
  static py::object PlainObject(const format::PlainData::Container& container,
                                const Objects& objects) {
    const std::vector<format::PlainData::Id>& items = container.items;
    if (container.kind == format::PlainData::Kind::kDict) {
      py::dict dict;
      for (size_t i = 0; i < items.size(); i += 2)
        Put(dict, objects[items[i]], objects[items[i + 1]]);
      return dict;
    }
    py::list list(items.size());
    for (size_t i = 0; i < items.size(); ++i) list[i] = objects[items[i]];
    switch (container.kind) {
      case format::PlainData::Kind::kTuple:
        return py::tuple(list);
      case format::PlainData::Kind::kSet:
        return Steal(PySet_New(list.ptr()));
      case format::PlainData::Kind::kFrozenSet:
        return Steal(PyFrozenSet_New(list.ptr()));
      default:
        return list;
    }
  }
};

py::object Decode(const py::buffer& file, const std::string& path) {
  const py::buffer_info view = file.request();
  format::Metadata metadata;
  {
    py::gil_scoped_release released;
    metadata = format::DecodeMetadata(Span(view), path);
  }
  return MetadataToPython(metadata);
}

// The data files that a `.metadata` file may name, each once: strings that end as their names do
// and come with the records, not before them, where tensors may be called so. Decoding all of the
// file would take ten times its size, for nothing.
py::list Files(const py::buffer& file, const std::string& path) {
  const py::buffer_info view = file.request();
  const std::span<const std::byte> bytes = Span(view);
  std::set<std::string, std::less<>> files, others;
  {
    const py::gil_scoped_release released;
    bool in_records = false;
    pickle::ForEachString(format::CheckMetadataTrailer(bytes, path).pickle, path,
                          [&](std::string_view text) {
                            in_records = in_records || text == "storage_data";
                            if (!text.ends_with(".distcp") || others.contains(text)) return;
                            auto& seen = in_records ? files : others;
                            if (!seen.contains(text)) seen.emplace(text);
                          });
  }
  py::list names;
  for (const std::string& name : files) names.append(py::bytes(name));
  return names;
}

py::object Encode(const py::object& metadata) {
  const std::optional<format::Metadata> converted = MetadataFromPython(metadata);
  if (!converted) return py::none();
  std::string file;
  {
    py::gil_scoped_release released;
    file = format::EncodeMetadata(*converted);
  }
  return py::bytes(file);
}

py::bytes ReadFile(const std::string& directory, const std::string& name) {
  std::vector<std::byte> bytes;
  {
    const py::gil_scoped_release released;
    bytes = checkpoint::ReadMetadataFile(io::PosixFileSystem(), directory, name);
  }
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

py::bytes Trailer(const py::buffer& pickle) {
  return format::MetadataTrailer(Span(pickle.request()));
}

py::bytes MarkMetadata(const py::buffer& file, uint64_t run, uint64_t commit) {
  const py::buffer_info view = file.request();
  std::string marked;
  {
    const py::gil_scoped_release released;
    marked = format::WithRunMark(Span(view), {run, commit}, "the metadata to be written");
  }
  return marked;
}

// (run, commit), or None.
py::object ReadRunMark(const std::string& directory) {
  std::optional<format::RunMark> mark;
  {
    const py::gil_scoped_release released;
    mark = checkpoint::ReadRunMark(io::PosixFileSystem(), directory);
  }
  if (!mark) return py::none();
  return py::make_tuple(mark->run, mark->commit);
}

}  // namespace

py::object MetadataToPython(const format::Metadata& metadata) {
  const CollectorPause paused;
  return PythonMetadata().Make(metadata);
}

void BindMetadata(py::module_& module) {
  module.attr("MAX_METADATA_BYTES") = format::kMaxMetadataBytes;
  module.def("decode_metadata", &Decode, py::arg("file"), py::arg("path"));
  module.def("metadata_files", &Files, py::arg("file"), py::arg("path"));
  module.def("read_metadata_file", &ReadFile, py::arg("directory"), py::arg("name"));
  module.def("encode_metadata", &Encode, py::arg("metadata"));
  module.def("mark_metadata", &MarkMetadata, py::arg("file"), py::arg("run"), py::arg("commit"));
  module.def("read_run_mark", &ReadRunMark, py::arg("directory"));
  module.def("metadata_trailer", &Trailer, py::arg("pickle"));
}

}  // namespace hsdp_ckpt::python
