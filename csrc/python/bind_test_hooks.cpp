// What only tests call. Compiled in builds with tests only; no other build has these names.
#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <functional>
#include <optional>
#include <string>

#include "base/left_out.h"
#include "io/injected_fault.h"
#include "kernels/copied_bytes.h"
#include "python/module.h"

namespace py = pybind11;

namespace hsdp_ckpt::python {

void BindTestHooks(py::module_& module) {
  module.def(
      "_inject_fault",
      [](const std::optional<std::function<int(std::string, std::string)>>& fault) {
        io::InjectFault(fault ? io::InjectedFault(*fault) : io::InjectedFault());
      },
      py::arg("fault"));
  module.def("_copied_bytes", &kernels::CopiedBytes);
  module.def("_leave_out", &base::LeaveOut, py::arg("name"));
  module.def("_orderings_seen", &base::OrderingsSeen);
}

}  // namespace hsdp_ckpt::python
