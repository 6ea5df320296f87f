// The static plan of a save. What there is of each tensor stays here, and crosses when it is asked
// for; the coordinator's whole metadata is made without the GIL.
#include <pybind11/stl.h>

#include <map>

#include "checkpoint/save/save_plan.h"
#include "python/metadata_from_python.h"
#include "python/module.h"

namespace py = pybind11;

namespace hsdp_ckpt::python {
namespace {

using ShardingArgument =
    std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>, bool>;
using TensorArgument =
    std::tuple<std::string, std::string, format::Shape, size_t, std::optional<format::Shape>, bool>;
using PieceResult = std::tuple<size_t, format::Shape, format::Shape>;
using PlaceResult = std::pair<int64_t, int64_t>;
using IdentityArgument = std::tuple<uint32_t, uint32_t, int64_t, uint64_t>;
using WriterArgument = std::pair<IdentityArgument, std::vector<std::pair<std::string, int64_t>>>;

// The tensors come one by one, so that there is no list of them besides the plan.
std::unique_ptr<checkpoint::SavePlan> MakePlan(const std::vector<ShardingArgument>& shardings,
                                               const py::iterable& tensors) {
  std::vector<checkpoint::Sharding> plan_shardings;
  for (const auto& [mesh_shape, ranks, dims, whole] : shardings)
    plan_shardings.push_back({mesh_shape, ranks, dims, whole});
  std::vector<checkpoint::PlannedTensor> plan_tensors;
  std::map<format::Shape, checkpoint::SharedShape> shapes;
  const auto shared = [&](const format::Shape& shape) {
    checkpoint::SharedShape& known = shapes[shape];
    if (!known) known = std::make_shared<const format::Shape>(shape);
    return known;
  };
  for (const py::handle tensor : tensors) {
    auto [fqn, dtype_name, size, sharding, strides, pinned] = tensor.cast<TensorArgument>();
    const format::DType* dtype = format::FindDType(std::string_view(dtype_name));
    if (dtype == nullptr) throw py::value_error("no record format for dtype " + dtype_name);
    plan_tensors.push_back({std::move(fqn), dtype, shared(size), sharding,
                            strides ? shared(*strides) : checkpoint::SharedShape(), pinned});
  }
  const py::gil_scoped_release release;
  return std::make_unique<checkpoint::SavePlan>(std::move(plan_shardings), std::move(plan_tensors));
}

PieceResult PieceAt(const checkpoint::PieceList& pieces, size_t i) {
  if (i >= pieces.size()) throw py::index_error();
  checkpoint::Piece piece = pieces[i];
  return {piece.tensor, std::move(piece.offsets), std::move(piece.sizes)};
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

// Of the plan's tensors, then of the objects. None for paths that no plan has.
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

py::object CompleteMetadata(const checkpoint::SavePlan& plan, const py::object& skeleton,
                            const checkpoint::PlannedPaths* paths,
                            const std::vector<WriterArgument>& writers, uint64_t save_id,
                            bool single_file) {
  const std::optional<format::Metadata> metadata = MetadataFromPython(skeleton);
  if (!metadata) return py::none();
  std::vector<checkpoint::SavePlan::Writer> all;
  for (const auto& [identity, objects] : writers) {
    const auto& [host, boot, pid, start] = identity;
    all.push_back({{host, boot, pid, start}, objects});
  }
  checkpoint::SavePlan::Encoded encoded;
  {
    const py::gil_scoped_release release;
    encoded =
        plan.Encode(all, save_id, single_file, paths, metadata->storage_meta, metadata->version);
  }
  const py::object file = py::cast(EncodedMetadata{std::move(encoded.metadata)});
  return py::make_tuple(py::memoryview(file), encoded.files);
}

}  // namespace

void BindPlan(py::module_& module) {
  py::class_<checkpoint::PieceList>(module, "PieceList")
      .def("__len__", &checkpoint::PieceList::size)
      .def("__getitem__", &PieceAt)
      .def("__iter__", [](const py::object& self) {
        return py::reinterpret_steal<py::object>(PySeqIter_New(self.ptr()));
      });
  py::class_<checkpoint::PlannedFile>(module, "PlannedFile")
      .def("__len__", [](const checkpoint::PlannedFile& file) { return file.records.size(); })
      .def_readonly("size", &checkpoint::PlannedFile::size)
      .def("places", &Places, py::arg("first") = 0, py::arg("count") = SIZE_MAX / 2)
      .def_property_readonly("payloads", &Payloads);
  py::class_<EncodedMetadata>(module, "EncodedMetadata", py::buffer_protocol())
      .def_buffer([](EncodedMetadata& file) {
        return py::buffer_info(reinterpret_cast<const uint8_t*>(file.bytes.data()),
                               static_cast<py::ssize_t>(file.bytes.size()));
      });
  py::class_<checkpoint::PlannedPaths>(module, "PlannedPaths");
  py::class_<checkpoint::SavePlan>(module, "SavePlan")
      .def(py::init(&MakePlan), py::arg("shardings"), py::arg("tensors"))
      .def("paths", &Paths, py::arg("objects"), py::arg("paths"))
      .def("pieces", &checkpoint::SavePlan::PiecesOf, py::arg("rank"))
      .def("local_shards", &checkpoint::SavePlan::LocalShards, py::arg("rank"))
      .def("shard_offsets", &checkpoint::SavePlan::ShardOffsets, py::arg("rank"), py::arg("tensor"))
      .def("layout", &checkpoint::SavePlan::Layout, py::arg("pieces"), py::arg("objects"),
           py::arg("single_file"))
      .def("complete_metadata", &CompleteMetadata, py::arg("skeleton"), py::arg("paths"),
           py::arg("writers"), py::arg("save_id"), py::arg("single_file"));
  module.def("process_identity", [] {
    const format::ProcessIdentity self = format::ThisProcess();
    return py::make_tuple(self.host, self.boot, self.pid, self.start);
  });
}

}  // namespace hsdp_ckpt::python
