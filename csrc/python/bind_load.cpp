// Planning a load in C++ and sharing its reads among ranks, for torch_hsdp_ckpt/checkpoint/load/load.py.
#include "base/error.h"
#include "checkpoint/load/load_planner.h"
#include "checkpoint/load/shared_exchange.h"
#include "python/metadata_to_python.h"
#include "python/module.h"

namespace py = pybind11;

namespace hsdp_ckpt::python {
namespace {

using Names = std::vector<std::string>;
using BoxArgument = std::tuple<std::string, format::Shape, format::Shape>;
using PartResult =
    std::tuple<std::string, int64_t, int64_t, format::Shape, format::Shape, format::Shape>;
using PlaceResult = std::tuple<std::string, int64_t, int64_t>;

std::unique_ptr<checkpoint::LoadPlanner> MakePlanner(const py::bytes& file,
                                                     const std::string& path) {
  const std::string_view view = file;
  const py::gil_scoped_release release;
  return std::make_unique<checkpoint::LoadPlanner>(
      format::DecodeMetadata(std::as_bytes(std::span(view)), path), path);
}

// A tensor's size, False for an object, None for nothing of that name.
py::list Describe(const checkpoint::LoadPlanner& planner, const Names& names) {
  py::list out;
  for (const std::string& name : names) {
    const format::EntryMetadata* entry = planner.Find(name);
    const auto* tensor = entry == nullptr ? nullptr : std::get_if<format::TensorMetadata>(entry);
    if (tensor != nullptr)
      out.append(py::cast(tensor->size));
    else
      out.append(entry == nullptr ? py::object(py::none()) : py::bool_(false));
  }
  return out;
}

std::vector<std::vector<PartResult>> Plan(const checkpoint::LoadPlanner& planner,
                                          const std::vector<BoxArgument>& boxes) {
  std::vector<std::vector<PartResult>> out;
  out.reserve(boxes.size());
  for (const auto& [name, offsets, sizes] : boxes) {
    auto& parts = out.emplace_back();
    for (const checkpoint::ChunkRead& read : planner.Plan(name, {offsets, sizes})) {
      parts.emplace_back(read.place->relative_path, read.place->offset, read.place->length,
                         read.in_record, read.in_box, read.sizes);
    }
  }
  return out;
}

std::vector<PlaceResult> Objects(const checkpoint::LoadPlanner& planner, const Names& names) {
  std::vector<PlaceResult> out;
  for (const std::string& name : names) {
    const format::StorageInfo& place = planner.PlaceOfObject(name);
    out.emplace_back(place.relative_path, place.offset, place.length);
  }
  return out;
}

// That the chunks of these tensors cover all of them, once.
void CheckCovered(const checkpoint::LoadPlanner& planner, const Names& names) {
  for (const std::string& name : names) {
    const format::EntryMetadata* entry = planner.Find(name);
    const auto* tensor = entry == nullptr ? nullptr : std::get_if<format::TensorMetadata>(entry);
    if (tensor != nullptr) planner.Plan(name, {format::Shape(tensor->size.size()), tensor->size});
  }
}

Names AllNames(const checkpoint::LoadPlanner& planner) {
  Names names;
  for (const auto& [name, entry] : planner.metadata().state_dict_metadata) names.push_back(name);
  return names;
}

}  // namespace

void BindLoad(py::module_& module) {
  const auto released = py::call_guard<py::gil_scoped_release>();
  py::class_<checkpoint::LoadPlanner>(module, "LoadPlanner")
      .def(py::init(&MakePlanner), py::arg("file"), py::arg("path"))
      .def_property_readonly("has_transforms", &checkpoint::LoadPlanner::has_transforms)
      .def("names", &AllNames)
      .def("metadata",
           [](const checkpoint::LoadPlanner& planner) {
             return MetadataToPython(planner.metadata());
           })
      .def("describe", &Describe, py::arg("names"))
      .def("plan", &Plan, py::arg("boxes"), released)
      .def("objects", &Objects, py::arg("names"), released)
      .def(
          "check_explained",
          [](const checkpoint::LoadPlanner& planner, const std::string& directory, bool lenient) {
            planner.CheckExplained(io::PosixFileSystem(), directory, lenient);
          },
          py::arg("directory"), py::arg("lenient"), released)
      .def("check_covered", &CheckCovered, py::arg("names"), released);
  py::class_<checkpoint::SharedExchange>(module, "SharedExchange")
      .def_readonly_static("MAX_MEMBERS", &checkpoint::SharedExchange::kMaxMembers)
      .def_static("create", &checkpoint::SharedExchange::Create, py::arg("members"), released)
      .def_static("join", &checkpoint::SharedExchange::Join, py::arg("path"), py::arg("member"),
                  py::arg("members"), released)
      .def_property_readonly("path", &checkpoint::SharedExchange::path)
      .def_property_readonly("peer_failed", &checkpoint::SharedExchange::peer_failed)
      .def("run", &checkpoint::SharedExchange::Run, py::arg("plan"), py::arg("threads"),
           py::arg("timeout"), released)
      .def("abort", &checkpoint::SharedExchange::Abort);
}

}  // namespace hsdp_ckpt::python
