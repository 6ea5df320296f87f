#include "python/metadata_from_python.h"

#include <unordered_map>

#include "python/dcp_types.h"

namespace py = pybind11;

namespace hsdp_ckpt::python {
namespace {

// Thrown and caught in here only: a value that has no exact C++ counterpart.
struct Foreign {};

class Converter : DcpTypes {
 public:
  format::Metadata Convert(const py::object& object) {
    Expect(object, metadata_);
    format::Metadata metadata;
    const py::object entries = Get(object, state_dict_metadata_);
    ForEachItem(entries, [&](const py::object& name, const py::object& entry) {
      metadata.state_dict_metadata.emplace_back(Str(name), Entry(entry));
    });
    PlainNode(Get(object, planner_data_), metadata.planner_data, 0);
    if (const py::object storage = Get(object, storage_data_); !storage.is_none()) {
      auto& pairs = metadata.storage_data.emplace();
      ForEachItem(storage, [&](const py::object& index, const py::object& info) {
        pairs.emplace_back(Index(index), Info(info));
      });
    }
    if (const py::object meta = Get(object, storage_meta_); !meta.is_none())
      metadata.storage_meta = Meta(meta);
    metadata.version = OptionalStr(Get(object, version_));
    return metadata;
  }

 private:
  static void Check(bool known) {
    if (!known) throw Foreign();
  }
  static void Expect(const py::object& object, const py::object& cls) {
    Check(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) == cls.ptr());
  }
  static py::object Get(const py::object& object, const py::str& name) {
    PyObject* value = PyObject_GetAttr(object.ptr(), name.ptr());
    if (!value) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
  }
  template <typename Function>
  static void ForEachItem(const py::object& dict, const Function& function) {
    Check(PyDict_CheckExact(dict.ptr()));
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(dict.ptr(), &at, &key, &value);) {
      function(py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value));
    }
  }

  static std::string Str(const py::object& object) {
    Check(PyUnicode_CheckExact(object.ptr()));
    Py_ssize_t size = 0;
    if (const char* text = PyUnicode_AsUTF8AndSize(object.ptr(), &size))
      return {text, static_cast<size_t>(size)};
    PyErr_Clear();  // a lone surrogate: the way without the cache
    PyObject* bytes = PyUnicode_AsEncodedString(object.ptr(), "utf-8", "surrogatepass");
    if (!bytes) throw py::error_already_set();
    return py::reinterpret_steal<py::bytes>(bytes);
  }
  static std::optional<std::string> OptionalStr(const py::object& object) {
    if (object.is_none()) return std::nullopt;
    return Str(object);
  }
  static std::vector<std::string> Strings(const py::object& object) {
    Check(PyList_CheckExact(object.ptr()));
    std::vector<std::string> strings;
    for (const py::handle item : object)
      strings.push_back(Str(py::reinterpret_borrow<py::object>(item)));
    return strings;
  }
  static int64_t Int(PyObject* object) {
    Check(PyLong_CheckExact(object));
    int overflow = 0;
    const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
    Check(overflow == 0);
    return value;
  }
  static bool Bool(const py::object& object) {
    Check(PyBool_Check(object.ptr()));
    return object.ptr() == Py_True;
  }
  static format::Shape Numbers(const py::object& tuple) {
    format::Shape shape(static_cast<size_t>(PyTuple_GET_SIZE(tuple.ptr())));
    for (size_t i = 0; i < shape.size(); ++i)
      shape[i] = Int(PyTuple_GET_ITEM(tuple.ptr(), static_cast<Py_ssize_t>(i)));
    return shape;
  }
  format::Shape Size(const py::object& object) const {
    Expect(object, size_);
    return Numbers(object);
  }

  format::TensorProperties Properties(const py::object& object) {
    Expect(object, tensor_properties_);
    format::TensorProperties properties;
    properties.dtype = TorchName(Get(object, dtype_), dtypes_, &format::DtypeFromName);
    properties.layout = TorchName(Get(object, layout_), layouts_, &format::LayoutFromName);
    properties.requires_grad = Bool(Get(object, requires_grad_));
    const py::object format = Get(object, memory_format_);
    size_t code = 0;
    while (code < 3 && !memory_formats_[code].is(format)) ++code;
    Check(code < 3);
    properties.memory_format = static_cast<format::MemoryFormat>(code);
    properties.pin_memory = Bool(Get(object, pin_memory_));
    if (knows_strides_) {
      const py::object strides = Get(object, strides_);
      Check(strides.is_none() || PyTuple_CheckExact(strides.ptr()));
      if (!strides.is_none()) properties.strides = Numbers(strides);
    }
    return properties;
  }
  // torch.float32 and its like: singletons, so each is asked for its name once.
  template <typename Enum>
  static Enum TorchName(const py::object& object, std::unordered_map<PyObject*, Enum>& known,
                        std::optional<Enum> (*from_name)(std::string_view)) {
    if (const auto found = known.find(object.ptr()); found != known.end()) return found->second;
    const std::string name = py::str(object);
    Check(name.starts_with("torch."));
    const auto value = from_name(std::string_view(name).substr(6));
    Check(value.has_value());
    return known[object.ptr()] = *value;
  }

  format::EntryMetadata Entry(const py::object& object) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) == bytes_.ptr())
      return format::BytesMetadata{};
    Expect(object, tensor_);
    format::TensorMetadata tensor{
        Properties(Get(object, properties_)), Size(Get(object, size_name_)), {}};
    const py::object chunks = Get(object, chunks_);
    Check(PyList_CheckExact(chunks.ptr()));
    for (const py::handle item : chunks) {
      const auto chunk = py::reinterpret_borrow<py::object>(item);
      Expect(chunk, chunk_);
      tensor.chunks.push_back({Size(Get(chunk, offsets_)), Size(Get(chunk, sizes_))});
    }
    return tensor;
  }
  format::MetadataIndex Index(const py::object& object) const {
    Expect(object, index_);
    format::MetadataIndex index{Str(Get(object, fqn_)), {}, {}};
    if (const py::object offset = Get(object, offset_); !offset.is_none())
      index.offset = Size(offset);
    if (const py::object hint = Get(object, index_name_); !hint.is_none())
      index.index = Int(hint.ptr());
    return index;
  }
  format::StorageInfo Info(const py::object& object) const {
    Expect(object, storage_info_);
    format::StorageInfo info{Str(Get(object, relative_path_)),
                             Int(Get(object, offset_).ptr()),
                             Int(Get(object, length_).ptr()),
                             {}};
    if (const py::object transforms = Get(object, transform_descriptors_); !transforms.is_none()) {
      info.transform_descriptors = Strings(transforms);
    }
    return info;
  }
  format::StorageMeta Meta(const py::object& object) const {
    Expect(object, storage_meta_class_);
    format::StorageMeta meta;
    const py::object checkpoint_id = Get(object, checkpoint_id_);
    if (PyUnicode_CheckExact(checkpoint_id.ptr())) {
      meta.checkpoint_id = Str(checkpoint_id);
    } else if (!checkpoint_id.is_none()) {
      Expect(checkpoint_id, py::module_::import("pathlib").attr("PosixPath"));
      format::PathlibPath path{"PosixPath", {}};
      for (const py::handle part : checkpoint_id.attr("parts"))
        path.parts.push_back(Str(py::reinterpret_borrow<py::object>(part)));
      meta.checkpoint_id = std::move(path);
    }
    meta.save_id = OptionalStr(Get(object, save_id_));
    meta.load_id = OptionalStr(Get(object, load_id_));
    meta.modules = Strings(Get(object, modules_));
    return meta;
  }

  // ---- plain data ----
  // A list that stands in two places stays one node. A value inside itself runs into the depth
  // limit, which pickle takes over.
  format::PlainData::Id PlainNode(const py::object& object, format::PlainData& data, int depth) {
    Check(depth <= 200);
    if (const auto seen = plain_ids_.find(object.ptr()); seen != plain_ids_.end())
      return seen->second;
    format::PlainData::Node node = PlainValue(object, data, depth);
    data.nodes.push_back(std::move(node));
    const auto id = static_cast<format::PlainData::Id>(data.nodes.size() - 1);
    plain_ids_[object.ptr()] =
        id;  // the metadata holds it, so the address is its own until we are done
    return id;
  }
  format::PlainData::Node PlainValue(const py::object& object, format::PlainData& data, int depth) {
    PyObject* raw = object.ptr();
    if (object.is_none()) return format::PlainData::None{};
    if (PyBool_Check(raw)) return raw == Py_True;
    if (PyUnicode_CheckExact(raw)) return Str(object);
    if (PyFloat_CheckExact(raw)) return PyFloat_AS_DOUBLE(raw);
    if (PyBytes_CheckExact(raw))
      return format::PlainData::Bytes{py::reinterpret_borrow<py::bytes>(object)};
    if (PyLong_CheckExact(raw)) {
      int overflow = 0;
      const int64_t value = PyLong_AsLongLongAndOverflow(raw, &overflow);
      if (overflow == 0) return value;
      const auto bytes = py::cast<int64_t>(object.attr("bit_length")()) / 8 + 1;
      const py::bytes little = object.attr("to_bytes")(bytes, "little", py::arg("signed") = true);
      return format::PlainData::BigInt{little};
    }
    using Kind = format::PlainData::Kind;
    format::PlainData::Container container{};
    if (PyDict_CheckExact(raw)) {
      container.kind = Kind::kDict;
      ForEachItem(object, [&](const py::object& key, const py::object& value) {
        container.items.push_back(PlainNode(key, data, depth + 1));
        container.items.push_back(PlainNode(value, data, depth + 1));
      });
      return container;
    }
    if (PyTuple_CheckExact(raw)) {
      container.kind = Kind::kTuple;
    } else if (PyList_CheckExact(raw)) {
      container.kind = Kind::kList;
    } else {
      Check(PySet_CheckExact(raw) || PyFrozenSet_CheckExact(raw));
      container.kind = PyFrozenSet_CheckExact(raw) ? Kind::kFrozenSet : Kind::kSet;
    }
    for (const py::handle item : object) {
      container.items.push_back(
          PlainNode(py::reinterpret_borrow<py::object>(item), data, depth + 1));
    }
    return container;
  }

  std::unordered_map<PyObject*, format::Dtype> dtypes_;
  std::unordered_map<PyObject*, format::Layout> layouts_;
  std::unordered_map<PyObject*, format::PlainData::Id> plain_ids_;
};

}  // namespace

std::optional<format::Metadata> MetadataFromPython(const py::object& metadata) {
  try {
    return Converter().Convert(metadata);
  } catch (const Foreign&) {
    return std::nullopt;
  }
}

}  // namespace hsdp_ckpt::python
