// Verifying a checkpoint, for torch_hsdp_ckpt/_verify.py.
#include "checkpoint/verify.h"
#include "python/module.h"

namespace py = pybind11;

namespace hsdp_ckpt {

void BindVerify(py::module_& module) {
  py::class_<Problem>(module, "Problem")
      .def_readonly("file", &Problem::file)
      .def_readonly("record", &Problem::record)
      .def_readonly("message", &Problem::message)
      .def("__repr__", [](const Problem& problem) {
        return "Problem(file=" + problem.file + ", record=" + problem.record + ", message=" + problem.message + ")";
      });
  py::class_<VerifyReport>(module, "VerifyReport")
      .def_readonly("problems", &VerifyReport::problems)
      .def_readonly("unchecked", &VerifyReport::unchecked)
      .def_readonly("leftovers", &VerifyReport::leftovers)
      .def_readonly("files", &VerifyReport::files)
      .def_readonly("tensors", &VerifyReport::tensors)
      .def_readonly("objects", &VerifyReport::objects)
      .def_readonly("bytes", &VerifyReport::bytes)
      .def_property_readonly("ok", [](const VerifyReport& report) { return report.problems.empty(); })
      .def("__repr__", [](const VerifyReport& report) {
        return "VerifyReport(ok=" + std::string(report.problems.empty() ? "True" : "False") +
               ", problems=" + std::to_string(report.problems.size()) +
               ", unchecked=" + std::to_string(report.unchecked.size()) +
               ", leftovers=" + std::to_string(report.leftovers.size()) + ", files=" + std::to_string(report.files) +
               ", tensors=" + std::to_string(report.tensors) + ", objects=" + std::to_string(report.objects) +
               ", bytes=" + std::to_string(report.bytes) + ")";
      });
  module.def(
      "verify", [](const std::string& directory, int threads) { return Verify(PosixFileSystem(), directory, threads); },
      py::arg("directory"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace hsdp_ckpt
