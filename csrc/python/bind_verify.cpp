// Verifying a checkpoint, for torch_hsdp_ckpt/checkpoint/storage/verify.py.
#include "base/printable.h"
#include "checkpoint/verify/verify.h"
#include "python/module.h"

namespace py = pybind11;

namespace hsdp_ckpt::python {

void BindVerify(py::module_& module) {
  py::class_<checkpoint::VerifyProblem>(module, "VerifyProblem")
      .def_readonly("file", &checkpoint::VerifyProblem::file)
      .def_readonly("record", &checkpoint::VerifyProblem::record)
      .def_property_readonly(
          "message",
          [](const checkpoint::VerifyProblem& problem) { return base::Printable(problem.message); })
      .def("__repr__", [](const checkpoint::VerifyProblem& problem) {
        return base::Printable("VerifyProblem(file=" + problem.file + ", record=" + problem.record +
                               ", message=" + problem.message + ")");
      });
  py::class_<checkpoint::VerifyReport>(module, "VerifyReport")
      .def_readonly("problems", &checkpoint::VerifyReport::problems)
      .def_readonly("unchecked", &checkpoint::VerifyReport::unchecked)
      .def_readonly("leftovers", &checkpoint::VerifyReport::leftovers)
      .def_readonly("files", &checkpoint::VerifyReport::files)
      .def_readonly("tensors", &checkpoint::VerifyReport::tensors)
      .def_readonly("objects", &checkpoint::VerifyReport::objects)
      .def_readonly("bytes", &checkpoint::VerifyReport::bytes)
      .def_property_readonly(
          "ok", [](const checkpoint::VerifyReport& report) { return report.problems.empty(); })
      .def("__repr__", [](const checkpoint::VerifyReport& report) {
        return "VerifyReport(ok=" + std::string(report.problems.empty() ? "True" : "False") +
               ", problems=" + std::to_string(report.problems.size()) +
               ", unchecked=" + std::to_string(report.unchecked.size()) +
               ", leftovers=" + std::to_string(report.leftovers.size()) +
               ", files=" + std::to_string(report.files) +
               ", tensors=" + std::to_string(report.tensors) +
               ", objects=" + std::to_string(report.objects) +
               ", bytes=" + std::to_string(report.bytes) + ")";
      });
  module.def(
      "verify",
      [](const std::string& directory, int threads) {
        return checkpoint::Verify(io::PosixFileSystem(), directory, threads);
      },
      py::arg("directory"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace hsdp_ckpt::python
