// Snapshots: the copying of bytes, and what is read of many tensors at once, since a call of async_save has thousands of
// them to look at and milliseconds to do it in. Pieces cross as (source, target, bytes).
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <unordered_map>

#include "python/module.h"
#include "snapshot/staging_copy.h"

namespace py = pybind11;

namespace hsdp_ckpt {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;
using PieceArgument = std::tuple<uintptr_t, uintptr_t, int64_t>;

// A DTensor's local tensor; null for any other.
py::object LocalOf(const py::handle& tensor) {
  static const auto& name = *new py::str("_local_tensor");
  if (THPVariable_CheckExact(tensor.ptr())) return {};
  auto local = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), name.ptr()));
  if (!local) PyErr_Clear();
  return local && THPVariable_Check(local.ptr()) ? local : py::object();
}

void Append(std::string& out, int64_t word) { out.append(reinterpret_cast<const char*>(&word), sizeof(word)); }

// Whether a tensor's bytes lie where its address says, one after the other in row-major order.
bool IsDirect(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided && tensor.has_storage() && !tensor.is_meta() && !tensor.is_conj() &&
         !tensor.is_neg() && tensor.is_contiguous() &&
         static_cast<int64_t>(tensor.storage().nbytes() / tensor.itemsize()) >= tensor.storage_offset() + tensor.numel();
}

// For each tensor, or DTensor's local one: its address and its bytes, or 0 and its bytes where they do not lie there
// plainly. And all that a save's plan depends on: equal bytes for tensors of equal types, specs (the same objects), dtypes,
// shapes, strides and devices.
py::tuple ViewTensors(const py::list& tensors) {
  static const auto& name = *new py::str("_spec");
  std::string fingerprint;
  std::vector<uintptr_t> addresses;
  std::vector<int64_t> sizes;
  addresses.reserve(tensors.size());
  sizes.reserve(tensors.size());
  for (const py::handle tensor : tensors) {
    if (!THPVariable_Check(tensor.ptr())) throw py::type_error("view_tensors takes tensors");
    const py::object inner = LocalOf(tensor);
    const py::handle holder = inner ? py::handle(inner) : tensor;
    PyObject* spec = nullptr;
    if (inner) {
      spec = PyObject_GetAttr(tensor.ptr(), name.ptr());
      if (spec == nullptr) PyErr_Clear();
      Py_XDECREF(spec);  // the tensor keeps it
    }
    const at::Tensor& local = THPVariable_Unpack(holder.ptr());
    const bool direct = THPVariable_CheckExact(holder.ptr()) && IsDirect(local);
    Append(fingerprint, reinterpret_cast<int64_t>(Py_TYPE(tensor.ptr())));
    Append(fingerprint, reinterpret_cast<int64_t>(Py_TYPE(holder.ptr())));
    Append(fingerprint, reinterpret_cast<int64_t>(spec));
    Append(fingerprint, static_cast<int64_t>(local.scalar_type()) << 32 | static_cast<int64_t>(local.layout()) << 16 |
                            static_cast<int64_t>(direct) << 1 | static_cast<int64_t>(local.requires_grad()));
    Append(fingerprint, static_cast<int64_t>(local.device().type()) << 16 | (local.device().index() & 0xff));
    if (local.layout() == at::kStrided) {
      Append(fingerprint, local.dim());
      for (const int64_t size : local.sizes()) Append(fingerprint, size);
      for (const int64_t stride : local.strides()) Append(fingerprint, stride);
    }
    addresses.push_back(direct ? reinterpret_cast<uintptr_t>(local.const_data_ptr()) : 0);
    sizes.push_back(direct ? static_cast<int64_t>(local.nbytes()) : 0);
  }
  return py::make_tuple(py::bytes(fingerprint), addresses, sizes);
}

// For each stretch of memory the guarded tensor that begins there and is at least as long; -1 if there is none.
std::vector<int64_t> FindOwners(const std::vector<uintptr_t>& addresses, const std::vector<int64_t>& sizes,
                                const std::vector<uintptr_t>& guarded, const std::vector<int64_t>& guarded_sizes) {
  std::unordered_map<uintptr_t, size_t> by_address;
  for (size_t i = 0; i < guarded.size(); ++i) {
    if (guarded[i] == 0) continue;
    const auto [found, added] = by_address.emplace(guarded[i], i);
    if (!added && guarded_sizes[found->second] < guarded_sizes[i]) found->second = i;
  }
  std::vector<int64_t> owners;
  for (size_t i = 0; i < addresses.size(); ++i) {
    const auto found = addresses[i] == 0 ? by_address.end() : by_address.find(addresses[i]);
    const bool owned = found != by_address.end() && sizes[i] <= guarded_sizes[found->second];
    owners.push_back(owned ? static_cast<int64_t>(found->second) : -1);
  }
  return owners;
}

int64_t VersionOf(const at::Tensor& tensor) {
  return tensor.is_inference() ? 0 : static_cast<int64_t>(tensor._version());  // inference tensors count none
}

// The tensors' own counters and their local tensors', two for each.
std::vector<int64_t> TensorVersions(const py::list& tensors) {
  std::vector<int64_t> versions;
  versions.reserve(2 * tensors.size());
  for (const py::handle tensor : tensors) {
    versions.push_back(VersionOf(THPVariable_Unpack(tensor.ptr())));
    const py::object local = LocalOf(tensor);
    versions.push_back(VersionOf(THPVariable_Unpack(local ? local.ptr() : tensor.ptr())));
  }
  return versions;
}

}  // namespace

void BindSnapshot(py::module_& module) {
  py::class_<StagingCopy, std::shared_ptr<StagingCopy>>(module, "StagingCopy")
      .def(py::init([](const std::vector<PieceArgument>& pieces) {
             std::vector<CopyPiece> out;
             out.reserve(pieces.size());
             for (const auto& [source, target, size] : pieces) {
               out.push_back({reinterpret_cast<const std::byte*>(source), reinterpret_cast<std::byte*>(target), size});
             }
             return std::make_shared<StagingCopy>(out);
           }),
           py::arg("pieces"))
      .def("run", &StagingCopy::Run, NoGil())
      .def("finish", &StagingCopy::Finish, NoGil())
      .def("cancel", &StagingCopy::Cancel, NoGil())
      .def("first_change", &StagingCopy::FirstChange, py::arg("threads"), NoGil())
      .def_property_readonly("done", &StagingCopy::done)
      .def_property_readonly("bytes", &StagingCopy::bytes);
  module.def("find_owners", &FindOwners, py::arg("addresses"), py::arg("sizes"), py::arg("guarded"),
             py::arg("guarded_sizes"));
  module.def("view_tensors", &ViewTensors, py::arg("tensors"));
  module.def("tensor_versions", &TensorVersions, py::arg("tensors"));
}

}  // namespace hsdp_ckpt
