// Snapshots: what is read of a whole state dict at once, and the copying of its bytes. Nothing
// crosses tensor by tensor but what is kept for the next save.
#include "python/live_state.h"
#include "python/module.h"
#include "snapshot/staging_copy.h"

namespace py = pybind11;

namespace hsdp_ckpt::python {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;
using PartArgument = std::tuple<size_t, int64_t, int64_t>;

}  // namespace

void BindSnapshot(py::module_& module) {
  py::class_<snapshot::StagingCopy, std::shared_ptr<snapshot::StagingCopy>>(module, "StagingCopy")
      .def("run", &snapshot::StagingCopy::Run, NoGil())
      .def("finish", &snapshot::StagingCopy::Finish, NoGil())
      .def("cancel", &snapshot::StagingCopy::Cancel, NoGil())
      .def("first_change", &snapshot::StagingCopy::FirstChange, py::arg("threads"), NoGil())
      .def_property_readonly("done", &snapshot::StagingCopy::done)
      .def_property_readonly("bytes", &snapshot::StagingCopy::bytes);
  py::class_<StagingParts>(module, "StagingParts")
      .def(py::init([](const std::vector<PartArgument>& parts) {
             StagingParts out;
             for (const auto& [tensor, first, size] : parts)
               out.parts.push_back({tensor, first, size});
             return out;
           }),
           py::arg("parts"));
  py::class_<Watch, std::shared_ptr<Watch>>(module, "Watch")
      .def("changed", &Watch::Changed)
      .def("__len__", &Watch::size);
  py::class_<LiveState::Guarded>(module, "Guarded")
      .def_readonly("watch", &LiveState::Guarded::watch)
      .def_readonly("unguarded", &LiveState::Guarded::unguarded)
      .def_readonly("unguarded_bytes", &LiveState::Guarded::unguarded_bytes);
  py::class_<LiveState>(module, "LiveState")
      .def(py::init<const py::object&>(), py::arg("state_dict"))
      .def_property_readonly("fingerprint",
                             [](const LiveState& state) { return py::bytes(state.fingerprint()); })
      .def("has_fingerprint",
           [](const LiveState& state, const py::bytes& known) {
             return state.fingerprint() == std::string_view(known);
           })
      .def_property_readonly("values", &LiveState::Values)
      .def_property_readonly("places", &LiveState::places)
      .def("tensor", &LiveState::Tensor, py::arg("index"))
      .def("address", &LiveState::address, py::arg("index"))
      .def("memory", &LiveState::Memory, py::arg("index"))
      .def("replace", &LiveState::Replace, py::arg("index"), py::arg("tensor"))
      .def("find_guarded", &LiveState::FindGuarded, py::arg("parameters"), py::arg("optimizers"))
      .def("copies", &LiveState::Copies, py::arg("parts"), py::arg("skip"), py::arg("image"),
           py::arg("places"), py::arg("tensors"));
}

}  // namespace hsdp_ckpt::python
