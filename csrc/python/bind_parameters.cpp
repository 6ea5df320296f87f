// What is done with all parameters of a unit at once, several times a step: in Python's own lists,
// which its collector sees through.
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "python/module.h"

namespace py = pybind11;

namespace hsdp_ckpt::python {
namespace {

/// A parameter and the place it belongs to: a table of a module's, and a name there.
struct Entry {
  explicit Entry(const py::tuple& tuple) {
    if (tuple.size() != 3) throw py::type_error("an entry is a table, a name and a parameter");
    table = PyTuple_GET_ITEM(tuple.ptr(), 0);
    name = PyTuple_GET_ITEM(tuple.ptr(), 1);
    parameter = PyTuple_GET_ITEM(tuple.ptr(), 2);
  }

  PyObject *table, *name, *parameter;
};

void FillSlots(const std::vector<py::tuple>& entries) {
  for (const py::tuple& tuple : entries) {
    const Entry entry(tuple);
    if (PyObject_SetItem(entry.table, entry.name, entry.parameter) != 0) {
      throw py::error_already_set();
    }
  }
}

std::optional<size_t> FirstReplaced(const std::vector<py::tuple>& entries) {
  for (size_t i = 0; i < entries.size(); ++i) {
    const Entry entry(entries[i]);
    PyObject* const found = PyDict_GetItemWithError(entry.table, entry.name);
    if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (found != entry.parameter) return i;
  }
  return {};
}

bool HaveGradients(const std::vector<at::Tensor>& parameters) {
  for (const at::Tensor& parameter : parameters) {
    if (parameter.grad().defined()) return true;
  }
  return false;
}

void SetGradients(const std::vector<at::Tensor>& parameters,
                  const std::vector<at::Tensor>& gradients) {
  for (size_t i = 0; i < parameters.size(); ++i) parameters[i].mutable_grad() = gradients.at(i);
}

std::vector<int64_t> CountHolders(const std::vector<py::object>& tensors) {
  std::vector<int64_t> counts;
  counts.reserve(3 * tensors.size());
  for (const py::object& object : tensors) {
    if (!THPVariable_Check(object.ptr())) throw py::type_error("holders are counted of tensors");
    const at::Tensor& tensor = THPVariable_Unpack(object.ptr());
    counts.push_back(object.ref_count());
    counts.push_back(static_cast<int64_t>(tensor.use_count()));
    if (tensor.has_storage()) {
      counts.push_back(static_cast<int64_t>(tensor.storage().use_count()));
    }
  }
  return counts;
}

}  // namespace

void BindParameters(py::module_& module) {
  module.def("fill_slots", &FillSlots, py::arg("entries"));
  module.def("first_replaced", &FirstReplaced, py::arg("entries"));
  module.def("have_gradients", &HaveGradients, py::arg("parameters"));
  module.def("set_gradients", &SetGradients, py::arg("parameters"), py::arg("gradients"));
  module.def("count_holders", &CountHolders, py::arg("tensors"));
}

}  // namespace hsdp_ckpt::python
