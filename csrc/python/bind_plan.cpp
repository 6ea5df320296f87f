// The static plan of a save. Shapes and names cross as plain lists; the coordinator's whole metadata is made without the
// GIL.
#include <pybind11/stl.h>

#include "checkpoint/save_plan.h"
#include "python/metadata_from_python.h"
#include "python/metadata_to_python.h"
#include "python/module.h"

namespace py = pybind11;

namespace hsdp_ckpt {
namespace {

using ShardingArgument = std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>, bool>;
using TensorArgument = std::tuple<std::string, std::string, Shape, size_t>;
using PieceResult = std::tuple<size_t, Shape, Shape>;
using FileResult = std::tuple<std::vector<std::pair<int64_t, int64_t>>, std::vector<int64_t>, int64_t>;
using IdentityArgument = std::tuple<uint32_t, uint32_t, int64_t, uint64_t>;
using WriterArgument = std::pair<IdentityArgument, std::vector<std::pair<std::string, int64_t>>>;

std::unique_ptr<SavePlan> MakePlan(const std::vector<ShardingArgument>& shardings,
                                   const std::vector<TensorArgument>& tensors) {
  std::vector<Sharding> plan_shardings;
  for (const auto& [mesh_shape, ranks, dims, whole] : shardings) plan_shardings.push_back({mesh_shape, ranks, dims, whole});
  std::vector<PlannedTensor> plan_tensors;
  for (const auto& [fqn, dtype_name, size, sharding] : tensors) {
    const DType* dtype = FindDType(std::string_view(dtype_name));
    if (dtype == nullptr) throw py::value_error("no record format for dtype " + dtype_name);
    plan_tensors.push_back({fqn, dtype, size, sharding});
  }
  const py::gil_scoped_release release;
  return std::make_unique<SavePlan>(std::move(plan_shardings), std::move(plan_tensors));
}

std::vector<PieceResult> Results(const std::vector<Piece>& pieces) {
  std::vector<PieceResult> out;
  for (const Piece& piece : pieces) out.emplace_back(piece.tensor, piece.offsets, piece.sizes);
  return out;
}

std::vector<FileResult> LayoutFiles(const SavePlan& plan, const std::vector<PieceResult>& pieces,
                                    const std::vector<int64_t>& objects, bool single_file) {
  std::vector<Piece> given;
  for (const auto& [tensor, offsets, sizes] : pieces) given.push_back({tensor, offsets, sizes});
  std::vector<FileResult> out;
  for (const PlannedFile& file : plan.Layout(given, objects, single_file)) {
    auto& [places, payloads, size] = out.emplace_back();
    for (const PlannedRecord& record : file.records) {
      places.emplace_back(record.offset, record.length);
      payloads.push_back(record.payload);
    }
    size = file.size;
  }
  return out;
}

py::object CompleteMetadata(const SavePlan& plan, const py::object& skeleton, const std::vector<WriterArgument>& writers,
                            uint64_t save_id, bool single_file, bool encode) {
  std::optional<Metadata> metadata = MetadataFromPython(skeleton);
  if (!metadata) return py::none();
  std::vector<SavePlan::Writer> all;
  for (const auto& [identity, objects] : writers) {
    const auto& [host, boot, pid, start] = identity;
    all.push_back({{host, boot, pid, start}, objects});
  }
  std::vector<std::pair<std::string, int64_t>> files;
  std::string bytes;
  {
    const py::gil_scoped_release release;
    files = plan.AddTo(*metadata, all, save_id, single_file);
    if (encode) bytes = EncodeMetadata(*metadata);
  }
  return py::make_tuple(encode ? py::object(py::bytes(bytes)) : MetadataToPython(*metadata), files);
}

}  // namespace

void BindPlan(py::module_& module) {
  py::class_<SavePlan>(module, "SavePlan")
      .def(py::init(&MakePlan), py::arg("shardings"), py::arg("tensors"))
      .def(
          "pieces", [](const SavePlan& plan, int64_t rank) { return Results(plan.PiecesOf(rank)); }, py::arg("rank"))
      .def(
          "local_shards", [](const SavePlan& plan, int64_t rank) { return Results(plan.LocalShards(rank)); },
          py::arg("rank"))
      .def("layout", &LayoutFiles, py::arg("pieces"), py::arg("objects"), py::arg("single_file"))
      .def("complete_metadata", &CompleteMetadata, py::arg("skeleton"), py::arg("writers"), py::arg("save_id"),
           py::arg("single_file"), py::arg("encode"));
  module.def("process_identity", [] {
    const ProcessIdentity self = ThisProcess();
    return py::make_tuple(self.host, self.boot, self.pid, self.start);
  });
}

}  // namespace hsdp_ckpt
