// Planning a load in C++ and sharing its reads among ranks, for torch_hsdp_ckpt/checkpoint/load.
#include "base/error.h"
#include "checkpoint/load/checkpoint_reader.h"
#include "checkpoint/load/load_planner.h"
#include "checkpoint/load/record_places.h"
#include "checkpoint/load/shared_exchange.h"
#include "python/metadata_to_python.h"
#include "python/module.h"

namespace py = pybind11;

namespace hsdp_ckpt::python {
namespace {

using Names = std::vector<std::string>;

/// A box of a tensor, by the tensor's name: offsets and sizes in elements.
using BoxArgument = std::tuple<std::string, format::Shape, format::Shape>;

/// What `.metadata` says of one name.
struct SavedEntry {
  bool is_tensor = false;  ///< else it is an object
  format::Shape size;      ///< of the whole tensor
};

/// A ChunkRead that owns its record's place, for the time after the planner's.
struct ChunkToRead {
  checkpoint::RecordPlace record;
  format::Shape in_record;
  format::Shape in_box;
  format::Shape sizes;
};

checkpoint::RecordPlace PlaceOf(const std::string& name, const format::StorageInfo& info,
                                const format::Shape& chunk) {
  return {name, info.relative_path, info.offset, info.length, format::RecordOwner(name, chunk)};
}

std::unique_ptr<checkpoint::LoadPlanner> MakePlanner(const py::bytes& file,
                                                     const std::string& path) {
  const std::string_view view = file;
  const py::gil_scoped_release release;
  format::Metadata metadata = format::DecodeMetadata(std::as_bytes(std::span(view)), path);
  checkpoint::CheckRecordsDisjoint(metadata, path);
  return std::make_unique<checkpoint::LoadPlanner>(std::move(metadata), path);
}

std::vector<std::optional<SavedEntry>> Describe(const checkpoint::LoadPlanner& planner,
                                                const Names& names) {
  std::vector<std::optional<SavedEntry>> out(names.size());
  for (size_t i = 0; i < names.size(); ++i) {
    const format::EntryMetadata* entry = planner.Find(names[i]);
    if (entry == nullptr) continue;
    out[i].emplace();
    const auto* tensor = std::get_if<format::TensorMetadata>(entry);
    if (tensor != nullptr) out[i] = SavedEntry{true, tensor->size};
  }
  return out;
}

std::vector<ChunkToRead> PlanBox(const checkpoint::LoadPlanner& planner, const BoxArgument& box) {
  const auto& [name, offsets, sizes] = box;
  std::vector<ChunkToRead> chunks;
  for (checkpoint::ChunkRead& read : planner.Plan(name, {offsets, sizes})) {
    format::Shape chunk = offsets;  // where the record's tensor begins in the whole one
    for (size_t d = 0; d < chunk.size(); ++d) chunk[d] += read.in_box[d] - read.in_record[d];
    chunks.push_back({PlaceOf(name, *read.place, chunk), std::move(read.in_record),
                      std::move(read.in_box), std::move(read.sizes)});
  }
  return chunks;
}

std::vector<std::vector<ChunkToRead>> Plan(const checkpoint::LoadPlanner& planner,
                                           const std::vector<BoxArgument>& boxes) {
  std::vector<std::vector<ChunkToRead>> out;
  out.reserve(boxes.size());
  for (const BoxArgument& box : boxes) out.push_back(PlanBox(planner, box));
  return out;
}

std::vector<checkpoint::RecordPlace> Objects(const checkpoint::LoadPlanner& planner,
                                             const Names& names) {
  std::vector<checkpoint::RecordPlace> out;
  for (const std::string& name : names)
    out.push_back(PlaceOf(name, planner.PlaceOfObject(name), {}));
  return out;
}

Names AllNames(const checkpoint::LoadPlanner& planner) {
  Names names;
  for (const auto& [name, entry] : planner.metadata().state_dict_metadata) names.push_back(name);
  return names;
}

template <checkpoint::SizeCheck kCheck>
void CheckSizes(const checkpoint::LoadPlanner& planner, const std::string& directory) {
  planner.CheckSizes(io::PosixFileSystem(), directory, kCheck);
}

void BindPlanner(py::module_& module) {
  using checkpoint::LoadPlanner;
  using checkpoint::SizeCheck;
  const auto released = py::call_guard<py::gil_scoped_release>();
  py::class_<SavedEntry>(module, "SavedEntry")
      .def_readonly("is_tensor", &SavedEntry::is_tensor)
      .def_readonly("size", &SavedEntry::size);
  py::class_<ChunkToRead>(module, "ChunkToRead")
      // A copy, for a reference would keep the chunk alive, at some cost a record.
      .def_property_readonly("record", [](const ChunkToRead& chunk) { return chunk.record; })
      .def_readonly("in_record", &ChunkToRead::in_record)
      .def_readonly("in_box", &ChunkToRead::in_box)
      .def_readonly("sizes", &ChunkToRead::sizes);
  py::class_<LoadPlanner>(module, "LoadPlanner")
      .def(py::init(&MakePlanner), py::arg("file"), py::arg("path"))
      .def_property_readonly("has_transforms", &LoadPlanner::has_transforms)
      .def("names", &AllNames)
      .def("metadata",
           [](const LoadPlanner& planner) { return MetadataToPython(planner.metadata()); })
      .def("describe", &Describe, py::arg("names"), released)
      .def("plan", &Plan, py::arg("boxes"), released)
      .def("objects", &Objects, py::arg("names"), released)
      .def("check_sizes", &CheckSizes<SizeCheck::kStrict>, py::arg("directory"), released)
      .def("check_sizes_leniently", &CheckSizes<SizeCheck::kLenient>, py::arg("directory"),
           released)
      .def(
          "check_covered",
          [](const LoadPlanner& planner, const Names& names) {
            for (const std::string& name : names) planner.CheckCovered(name);
          },
          py::arg("names"), released);
}

void BindSharedExchange(py::module_& module) {
  using checkpoint::SharedExchange;
  const auto released = py::call_guard<py::gil_scoped_release>();
  py::class_<SharedExchange>(module, "SharedExchange")
      .def_readonly_static("MAX_MEMBERS", &SharedExchange::kMaxMembers)
      .def_static("create", &SharedExchange::Create, py::arg("members"), released)
      .def_static("join", &SharedExchange::Join, py::arg("path"), py::arg("member"),
                  py::arg("members"), released)
      .def_property_readonly("path", &SharedExchange::path)
      .def_property_readonly("peer_failed", &SharedExchange::peer_failed)
      .def("run", &SharedExchange::Run, py::arg("plan"), py::arg("threads"), py::arg("timeout"),
           released)
      .def("abort", &SharedExchange::Abort);
}

}  // namespace

void BindLoad(py::module_& module) {
  BindPlanner(module);
  BindSharedExchange(module);
}

}  // namespace hsdp_ckpt::python
