// The static plan of a save. What there is of each tensor stays here, and crosses when it is asked
// for; the coordinator's whole metadata is made without the GIL.
#include <pybind11/stl.h>

#include <map>

#include "checkpoint/commit/process_identity.h"
#include "checkpoint/save/save_plan.h"
#include "python/metadata_from_python.h"
#include "python/module.h"

namespace py = pybind11;

namespace hsdp_ckpt::python {
namespace {

using PlaceResult = std::pair<int64_t, int64_t>;

// A tensor as Python gives it: its shapes are shared with other tensors' only in the plan.
struct TensorToPlan {
  std::string name;
  const format::RecordDtype* dtype;
  format::Shape shape;
  size_t sharding;
  std::optional<format::Shape> strides;
  bool pinned;
};

TensorToPlan MakeTensor(std::string name, const std::string& dtype_name, format::Shape shape,
                        size_t sharding, std::optional<format::Shape> strides, bool pinned) {
  const format::RecordDtype* dtype = format::FindRecordDtype(dtype_name);
  if (dtype == nullptr) throw py::value_error("no record format for dtype " + dtype_name);
  return {std::move(name), dtype, std::move(shape), sharding, std::move(strides), pinned};
}

// The tensors come one by one, so that there is no list of them besides the plan.
std::unique_ptr<checkpoint::SavePlan> MakePlan(std::vector<checkpoint::Sharding> shardings,
                                               const py::iterable& tensors) {
  std::vector<checkpoint::PlannedTensor> plan_tensors;
  std::map<format::Shape, checkpoint::SharedShape> shapes;
  const auto shared = [&](const format::Shape& shape) {
    checkpoint::SharedShape& known = shapes[shape];
    if (!known) known = std::make_shared<const format::Shape>(shape);
    return known;
  };
  for (const py::handle each : tensors) {
    const auto& tensor = each.cast<const TensorToPlan&>();
    plan_tensors.push_back({tensor.name, tensor.dtype, shared(tensor.shape), tensor.sharding,
                            tensor.strides ? shared(*tensor.strides) : checkpoint::SharedShape(),
                            tensor.pinned});
  }
  const py::gil_scoped_release release;
  return std::make_unique<checkpoint::SavePlan>(std::move(shardings), std::move(plan_tensors));
}

checkpoint::PlannedChunk ChunkAt(const checkpoint::ChunkList& chunks, size_t i) {
  if (i >= chunks.size()) throw py::index_error();
  return chunks[i];
}

std::vector<PlaceResult> Places(const checkpoint::PlannedFile& file, size_t first, size_t count) {
  std::vector<PlaceResult> places;
  for (size_t i = first; i < std::min(first + count, file.records.size()); ++i) {
    places.emplace_back(file.records[i].offset, file.records[i].length);
  }
  return places;
}

std::vector<int64_t> Payloads(const checkpoint::PlannedFile& file) {
  std::vector<int64_t> payloads;
  for (const checkpoint::PlannedRecord& record : file.records) payloads.push_back(record.payload);
  return payloads;
}

std::vector<uint32_t> Owners(const checkpoint::PlannedFile& file) {
  std::vector<uint32_t> owners;
  for (const checkpoint::PlannedRecord& record : file.records) owners.push_back(record.owner);
  return owners;
}

// The bytes of a file that is too large to be there twice.
struct EncodedMetadata {
  std::string bytes;
};

// The lengths of the parts of a path within its name. False for what DCP's default planner does not
// make: another type than a key's or an index's, or parts that are not the name.
bool AddPath(checkpoint::PlannedPaths& paths, std::string_view name, const py::handle& path) {
  if (!PyTuple_CheckExact(path.ptr())) return false;
  const auto parts = py::reinterpret_borrow<py::tuple>(path);
  size_t at = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    const py::object part = parts[i];
    const bool is_index = PyLong_CheckExact(part.ptr()) != 0;
    if (!is_index && !PyUnicode_CheckExact(part.ptr())) return false;
    const std::string text = py::str(part);
    if (i > 0 && (at >= name.size() || name[at++] != '.')) return false;
    if (name.substr(at, text.size()) != text || text.size() > UINT32_MAX ||
        (is_index && text.size() > 18))
      return false;
    at += text.size();
    paths.parts.push_back({static_cast<uint32_t>(text.size()), is_index});
  }
  paths.counts.push_back(static_cast<uint32_t>(parts.size()));
  return at == name.size();
}

// The paths of the plan's tensors, then those of the objects. None for paths that no plan has.
std::optional<checkpoint::PlannedPaths> Paths(const checkpoint::SavePlan& plan,
                                              const std::vector<std::string>& objects,
                                              const py::iterable& paths) {
  checkpoint::PlannedPaths planned;
  const size_t tensors = plan.tensors().size();
  for (const py::handle path : paths) {
    const size_t number = planned.counts.size();
    if (number >= tensors + objects.size()) return std::nullopt;
    const std::string& name =
        number < tensors ? plan.tensors()[number].fqn : objects[number - tensors];
    if (!AddPath(planned, name, path)) return std::nullopt;
  }
  return planned;
}

// The metadata of a save: the bytes of `.metadata`, and the files that it names with their sizes.
struct CompleteMetadataResult {
  py::memoryview encoded;
  std::vector<std::pair<std::string, int64_t>> files;
};

CompleteMetadataResult CompleteMetadata(const checkpoint::SavePlan& plan,
                                        const py::object& skeleton,
                                        const checkpoint::PlannedPaths* paths,
                                        const std::vector<checkpoint::SavePlan::Writer>& writers,
                                        uint64_t save_id, bool single_file) {
  const std::optional<format::Metadata> metadata = MetadataFromPython(skeleton);
  if (!metadata) throw py::value_error("the skeleton is more than a version and a storage's meta");
  checkpoint::SavePlan::Encoded encoded;
  {
    const py::gil_scoped_release release;
    encoded = plan.Encode({.writers = writers,
                           .save_id = save_id,
                           .single_file = single_file,
                           .paths = paths,
                           .storage_meta = metadata->storage_meta,
                           .version = metadata->version});
  }
  const py::object file = py::cast(EncodedMetadata{std::move(encoded.metadata)});
  return {py::memoryview(file), std::move(encoded.files)};
}

}  // namespace

void BindPlan(py::module_& module) {
  py::class_<checkpoint::PlannedChunk>(module, "PlannedChunk")
      .def_readonly("tensor", &checkpoint::PlannedChunk::tensor)
      .def_readonly("offsets", &checkpoint::PlannedChunk::offsets)
      .def_readonly("sizes", &checkpoint::PlannedChunk::sizes);
  py::class_<checkpoint::ChunkList>(module, "ChunkList")
      .def("__len__", &checkpoint::ChunkList::size)
      .def("__getitem__", &ChunkAt)
      .def("__iter__", [](const py::object& self) {
        return py::reinterpret_steal<py::object>(PySeqIter_New(self.ptr()));
      });
  py::class_<checkpoint::PlannedFile>(module, "PlannedFile")
      .def("__len__", [](const checkpoint::PlannedFile& file) { return file.records.size(); })
      .def_readonly("size", &checkpoint::PlannedFile::size)
      .def("places", &Places, py::arg("first") = 0, py::arg("count") = SIZE_MAX / 2)
      .def_property_readonly("payloads", &Payloads)
      .def_property_readonly("owners", &Owners);
  py::class_<EncodedMetadata>(module, "EncodedMetadata", py::buffer_protocol())
      .def_buffer([](EncodedMetadata& file) {
        return py::buffer_info(reinterpret_cast<const uint8_t*>(file.bytes.data()),
                               static_cast<py::ssize_t>(file.bytes.size()));
      });
  py::class_<checkpoint::PlannedPaths>(module, "PlannedPaths");
  py::class_<checkpoint::Sharding>(module, "Sharding")
      .def(py::init([](std::vector<int64_t> mesh_shape, std::vector<int64_t> ranks,
                       std::vector<int64_t> shard_dims, bool whole) {
             return checkpoint::Sharding{std::move(mesh_shape), std::move(ranks),
                                         std::move(shard_dims), whole};
           }),
           py::arg("mesh_shape"), py::arg("ranks"), py::arg("shard_dims"), py::arg("whole"));
  py::class_<TensorToPlan>(module, "TensorToPlan")
      .def(py::init(&MakeTensor), py::arg("name"), py::arg("dtype"), py::arg("shape"),
           py::arg("sharding"), py::arg("strides"), py::arg("pinned"));
  py::class_<format::ProcessIdentity>(module, "ProcessIdentity")
      .def(py::init([](uint32_t host, uint32_t boot, int64_t pid, uint64_t start) {
             return format::ProcessIdentity{host, boot, pid, start};
           }),
           py::arg("host"), py::arg("boot"), py::arg("pid"), py::arg("start"))
      .def("__eq__", [](const format::ProcessIdentity& a,
                        const format::ProcessIdentity& b) { return a == b; })
      .def_readonly("host", &format::ProcessIdentity::host)
      .def_readonly("boot", &format::ProcessIdentity::boot)
      .def_readonly("pid", &format::ProcessIdentity::pid)
      .def_readonly("start", &format::ProcessIdentity::start);
  py::class_<checkpoint::SavePlan::Writer>(module, "SaveWriter")
      .def(py::init([](const format::ProcessIdentity& process,
                       std::vector<std::pair<std::string, int64_t>> objects) {
             return checkpoint::SavePlan::Writer{process, std::move(objects)};
           }),
           py::arg("process"), py::arg("objects"));
  py::class_<CompleteMetadataResult>(module, "CompleteMetadata")
      .def_readonly("encoded", &CompleteMetadataResult::encoded)
      .def_readonly("files", &CompleteMetadataResult::files);
  py::class_<checkpoint::SavePlan>(module, "SavePlan")
      .def(py::init(&MakePlan), py::arg("shardings"), py::arg("tensors"))
      .def("paths", &Paths, py::arg("objects"), py::arg("paths"))
      .def("chunks", &checkpoint::SavePlan::ChunksOf, py::arg("rank"))
      .def("local_shards", &checkpoint::SavePlan::LocalShards, py::arg("rank"))
      .def("shard_offsets", &checkpoint::SavePlan::ShardOffsets, py::arg("rank"), py::arg("tensor"))
      .def("layout", &checkpoint::SavePlan::Layout, py::arg("chunks"), py::arg("objects"),
           py::arg("single_file"))
      .def("complete_metadata", &CompleteMetadata, py::arg("skeleton"), py::arg("paths"),
           py::arg("writers"), py::arg("save_id"), py::arg("single_file"));
  module.def("process_identity", &checkpoint::ThisProcess);
}

}  // namespace hsdp_ckpt::python
