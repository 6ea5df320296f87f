#include "python/live_state.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <pybind11/gil_safe_call_once.h>
#include <torch/csrc/autograd/python_variable.h>

#include <atomic>
#include <bit>
#include <unordered_set>

namespace py = pybind11;

namespace hsdp_ckpt::python {
namespace {

// Attribute names, made once; never freed, since the interpreter may be gone by then.
PyObject* Name(const char* text) { return PyUnicode_InternFromString(text); }

py::object Steal(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

py::object Attribute(PyObject* object, PyObject* name) {
  PyObject* found = PyObject_GetAttr(object, name);
  if (found == nullptr) PyErr_Clear();
  return py::reinterpret_steal<py::object>(found);
}

// A DTensor's local tensor; null for any other.
py::object LocalOf(PyObject* tensor) {
  static PyObject* const name = Name("_local_tensor");
  if (THPVariable_CheckExact(tensor)) return {};
  py::object local = Attribute(tensor, name);
  return local && THPVariable_Check(local.ptr()) ? local : py::object();
}

// Whether a tensor's bytes lie where its address says, one after the other in row-major order.
bool IsDirect(const at::Tensor& tensor) {
  if (tensor.layout() != at::kStrided || !tensor.has_storage() || tensor.is_meta() ||
      tensor.is_conj() || tensor.is_neg() || !tensor.is_contiguous()) {
    return false;
  }
  const at::Storage& storage =
      tensor.unsafeGetTensorImpl()->unsafe_storage();  // no count of references moves
  // The full parameters of sharded modules have no address while they are freed, and raise where
  // one is asked for.
  const bool freed =
      storage.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().get() == nullptr &&
      tensor.numel() > 0;
  return !freed && static_cast<int64_t>(storage.nbytes() / tensor.itemsize()) >=
                       tensor.storage_offset() + tensor.numel();
}

int64_t VersionOf(PyObject* tensor) {
  const auto& counter = THPVariable_Unpack(tensor).unsafeGetTensorImpl()->version_counter();
  return counter.enabled() ? counter.current_version() : 0;  // inference tensors have none
}

Versions VersionsOf(PyObject* tensor, PyObject* local) {
  const int64_t version = VersionOf(tensor);
  return {version, local == tensor ? version : VersionOf(local)};
}

void Append(std::string& out, int64_t word) {
  out.append(reinterpret_cast<const char*>(&word), sizeof(word));
}

void AppendPointer(std::string& out, const void* pointer) {
  Append(out, reinterpret_cast<int64_t>(pointer));
}

// The string that DCP makes names and paths of.
void AppendKey(std::string& out, PyObject* key) {
  py::object text;
  if (!PyUnicode_CheckExact(key)) {
    text = Steal(PyObject_Str(key));
    key = text.ptr();
  }
  const int64_t length = PyUnicode_GET_LENGTH(key), kind = PyUnicode_KIND(key);
  Append(out, length << 3 | kind);
  out.append(static_cast<const char*>(PyUnicode_DATA(key)), static_cast<size_t>(length * kind));
}

enum class Kind { kObject, kTensor, kMapping, kList };

Kind KindOf(PyObject* value) {
  if (THPVariable_CheckExact(value)) return Kind::kTensor;
  if (PyDict_CheckExact(value)) return Kind::kMapping;
  if (PyList_CheckExact(value)) return Kind::kList;
  if (value == Py_None || PyUnicode_CheckExact(value) || PyLong_CheckExact(value) ||
      PyFloat_CheckExact(value) || PyBool_Check(value) || PyTuple_CheckExact(value)) {
    return Kind::kObject;
  }
  if (PyType_IsSubtype(Py_TYPE(value), reinterpret_cast<PyTypeObject*>(THPVariableClass)) != 0)
    return Kind::kTensor;
  if (THPVariable_Check(value)) return Kind::kTensor;
  // Not a static of its own: an import may let another thread have the GIL, which would then wait
  // for the static's guard.
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> mapping;
  mapping.call_once_and_store_result(
      [] { return py::object(py::module_::import("collections.abc").attr("Mapping")); });
  const int is_mapping = PyObject_IsInstance(value, mapping.get_stored().ptr());
  if (is_mapping < 0) throw py::error_already_set();
  if (is_mapping > 0) return Kind::kMapping;
  return PyList_Check(value) ? Kind::kList : Kind::kObject;
}

// Numbers addresses, 0 among them, in the order in which they come; a table for as many as are
// announced, without a node for each of thousands.
class ByAddress {
 public:
  static constexpr size_t kNone = SIZE_MAX;

  explicit ByAddress(size_t most) : slots_(std::bit_ceil(2 * most + 1), kNone) {
    addresses_.reserve(most);
  }

  size_t Add(uintptr_t address) {
    size_t& slot = slots_[SlotOf(address)];
    if (slot == kNone) {
      slot = addresses_.size();
      addresses_.push_back(address);
    }
    return slot;
  }
  size_t Find(uintptr_t address) const { return address == 0 ? kNone : slots_[SlotOf(address)]; }
  size_t size() const { return addresses_.size(); }

 private:
  // Where the address is, or else is to be.
  size_t SlotOf(uintptr_t address) const {
    size_t slot = static_cast<size_t>((address * 0x9E3779B97F4A7C15u) >> 32) & (slots_.size() - 1);
    while (slots_[slot] != kNone && addresses_[slots_[slot]] != address)
      slot = (slot + 1) & (slots_.size() - 1);
    return slot;
  }

  std::vector<size_t> slots_;
  std::vector<uintptr_t> addresses_;
};

// Structures nest as deep as Python lets functions do.
class Nesting {
 public:
  Nesting() {
    if (Py_EnterRecursiveCall(" in a state dict") != 0) throw py::error_already_set();
  }
  ~Nesting() { Py_LeaveRecursiveCall(); }
  Nesting(const Nesting&) = delete;
  Nesting& operator=(const Nesting&) = delete;
};

// DCP's rule for lists: those that hold no tensor and no mapping, however deep, are values.
bool IsTraversed(PyObject* list) {
  const Nesting nesting;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    const py::object item = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(list, i));
    const Kind kind = KindOf(item.ptr());
    if (kind == Kind::kTensor || kind == Kind::kMapping ||
        (kind == Kind::kList && IsTraversed(item.ptr())))
      return true;
  }
  return false;
}

}  // namespace

void Watch::Add(py::object owner, size_t tensor, Versions versions) {
  entries_.push_back({std::move(owner), tensor, versions});
}

int64_t Watch::Changed() const {
  for (const Entry& entry : entries_) {
    const py::object local = LocalOf(entry.owner.ptr());
    const Versions now = VersionsOf(entry.owner.ptr(), local ? local.ptr() : entry.owner.ptr());
    if (now != entry.versions || memory_->at(entry.tensor).IsLost())
      return static_cast<int64_t>(entry.tensor);
  }
  return -1;
}

LiveState::LiveState(const py::object& state_dict) {
  if (KindOf(state_dict.ptr()) != Kind::kMapping) throw py::type_error("a state dict is a mapping");
  // It is made as large as the one before, as a string that grows to hundreds of KiB touches twice
  // as much fresh memory.
  static std::atomic<size_t> last_size{0}, last_tensors{0};
  fingerprint_.reserve(last_size);
  tensors_.reserve(last_tensors);
  memory_->reserve(last_tensors);
  Walk(state_dict.ptr(), true);
  last_size = fingerprint_.size();
  last_tensors = tensors_.size();
}

void LiveState::Walk(PyObject* container, bool mapping) {
  const Nesting nesting;
  Append(fingerprint_, mapping ? 'M' : 'L');
  if (!mapping) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(container); ++i) {
      Take(py::reinterpret_borrow<py::object>(PyList_GET_ITEM(container, i)));
    }
  } else if (PyDict_CheckExact(container)) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(container, &at, &key, &value);) {
      // The key's __str__ may be anybody's code, which may empty the container.
      const py::object kept_key = py::reinterpret_borrow<py::object>(key);
      py::object kept = py::reinterpret_borrow<py::object>(value);
      AppendKey(fingerprint_, key);
      Take(std::move(kept));
    }
  } else {
    // A mapping's order and values are its own affair, an OrderedDict's too.
    static PyObject* const items = Name("items");
    const py::object iterator =
        Steal(PyObject_GetIter(Steal(PyObject_CallMethodNoArgs(container, items)).ptr()));
    while (PyObject* next = PyIter_Next(iterator.ptr())) {
      auto [key, value] = Steal(next).cast<std::pair<py::object, py::object>>();
      AppendKey(fingerprint_, key.ptr());
      Take(std::move(value));
    }
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  }
  Append(fingerprint_, 'E');
}

void LiveState::Take(py::object owned) {
  PyObject* const value = owned.ptr();
  const Kind kind = KindOf(value);
  if (kind == Kind::kMapping || (kind == Kind::kList && IsTraversed(value)))
    return Walk(value, kind == Kind::kMapping);
  values_.push_back(std::move(owned));
  if (kind == Kind::kTensor) {
    tensors_.push_back(PlaceOf(value, &fingerprint_));
    tensors_.back().value = values_.size() - 1;
    memory_->push_back(Hold(value, tensors_.back()));
  } else {
    Append(fingerprint_, 'O');
    AppendPointer(fingerprint_, Py_TYPE(value));
  }
}

LiveState::Place LiveState::PlaceOf(PyObject* tensor, std::string* fingerprint) const {
  static PyObject* const name = Name("_spec");
  const py::object inner = LocalOf(tensor);
  PyObject* const holder = inner ? inner.ptr() : tensor;
  const at::Tensor& local = THPVariable_Unpack(holder);
  const bool direct = THPVariable_CheckExact(holder) && IsDirect(local);
  if (fingerprint != nullptr) {
    const bool strided = local.layout() == at::kStrided;
    Append(*fingerprint, 'T');
    AppendPointer(*fingerprint, Py_TYPE(tensor));
    AppendPointer(*fingerprint, Py_TYPE(holder));
    AppendPointer(*fingerprint,
                  inner ? Attribute(tensor, name).ptr() : nullptr);  // the tensor keeps it
    Append(*fingerprint, static_cast<int64_t>(local.scalar_type()) << 32 |
                             static_cast<int64_t>(local.layout()) << 16 |
                             static_cast<int64_t>(direct) << 1 |
                             static_cast<int64_t>(local.requires_grad()));
    Append(*fingerprint,
           static_cast<int64_t>(local.device().type()) << 16 | (local.device().index() & 0xff));
    Append(*fingerprint, strided ? local.dim() : -1);
    if (strided) {
      for (const int64_t size : local.sizes()) Append(*fingerprint, size);
      for (const int64_t stride : local.strides()) Append(*fingerprint, stride);
    }
  }
  return {0,
          direct ? reinterpret_cast<uintptr_t>(local.const_data_ptr()) : 0,
          direct ? static_cast<int64_t>(local.nbytes()) : 0,
          local.is_cpu(),
          VersionsOf(tensor, holder),
          local.scalar_type()};
}

HeldMemory LiveState::Hold(PyObject* tensor, const Place& place) {
  if (place.address == 0) return {};
  const py::object inner = LocalOf(tensor);
  return HeldMemory(THPVariable_Unpack(inner ? inner.ptr() : tensor).storage());
}

py::list LiveState::Values() const {
  py::list out(values_.size());
  for (size_t i = 0; i < values_.size(); ++i) out[i] = values_[i];
  return out;
}

std::vector<size_t> LiveState::places() const {
  std::vector<size_t> out;
  for (const Place& tensor : tensors_) out.push_back(tensor.value);
  return out;
}

py::object LiveState::Tensor(size_t index) const { return values_[tensors_.at(index).value]; }

std::optional<at::Tensor> LiveState::Memory(size_t index) const {
  const Place& place = tensors_.at(index);
  TORCH_CHECK(place.address != 0, "tensor ", index, " of the state does not lie contiguous");
  const auto item = static_cast<int64_t>(c10::elementSize(place.dtype));
  if (place.on_cpu) {
    // Not by way of the storage, which may have other memory by now.
    return at::from_blob(
        reinterpret_cast<void*>(place.address), {place.bytes / item}, [kept = memory_](void*) {},
        at::TensorOptions(place.dtype));
  }
  const HeldMemory& memory = memory_->at(index);
  if (memory.IsLost()) return std::nullopt;
  const auto first = place.address - reinterpret_cast<uintptr_t>(memory.address());
  return at::empty({0}, at::TensorOptions(place.dtype).device(memory.storage().device()))
      .set_(memory.storage(), static_cast<int64_t>(first) / item, {place.bytes / item});
}

void LiveState::Replace(size_t index, const py::object& tensor) {
  if (!THPVariable_Check(tensor.ptr())) throw py::type_error("replace takes a tensor");
  Place& place = tensors_.at(index);
  const size_t value = place.value;
  place = PlaceOf(tensor.ptr(), nullptr);
  place.value = value;
  values_[value] = tensor;
  memory_->at(index) = Hold(tensor.ptr(), place);
}

// For each address among a state's tensors, the largest tensor that a guarded step updates.
class LiveState::Owners {
 public:
  struct Owner {
    py::object tensor;
    int64_t bytes = -1;
    Versions versions;
  };

  explicit Owners(const LiveState& state)
      : state_(state),
        numbers_(state.tensors_.size()),
        objects_(state.tensors_.size()),
        owner_of_(state.tensors_.size()) {
    for (size_t i = 0; i < state.tensors_.size(); ++i) {
      const Place& tensor = state.tensors_[i];
      owner_of_[i] = numbers_.Add(tensor.address);
      PyObject* const object = state.values_[tensor.value].ptr();
      if (objects_.Add(reinterpret_cast<uintptr_t>(object)) == tensor_of_.size())
        tensor_of_.push_back(i);
    }
    owners_.resize(numbers_.size());
  }

  // The parameters of the optimizer that are among `ours`, and the tensors of its state.
  void AddOptimizer(const py::handle& optimizer, const std::unordered_set<PyObject*>& ours) {
    for (const py::handle group : optimizer.attr("param_groups")) {
      for (const py::handle parameter : group["params"]) {
        if (ours.count(parameter.ptr()) != 0) Add(py::reinterpret_borrow<py::object>(parameter));
      }
    }
    for (const py::handle state : optimizer.attr("state").attr("values")()) {
      if (!py::isinstance<py::dict>(state)) continue;
      for (const auto& [key, value] : py::reinterpret_borrow<py::dict>(state)) {
        const py::object kept = py::reinterpret_borrow<py::object>(value);
        if (KindOf(kept.ptr()) == Kind::kTensor) Add(kept);
      }
    }
  }

  // The one that guards a tensor of the state, or null.
  const Owner* Of(size_t tensor) const {
    const Place& place = state_.tensors_[tensor];
    const Owner& owner = owners_[owner_of_[tensor]];
    return place.address != 0 && place.bytes <= owner.bytes ? &owner : nullptr;
  }

 private:
  void Add(const py::object& tensor) {
    // An optimizer's state is mostly the same objects, which have been looked at. What costs is to
    // bring each from memory.
    const size_t object = objects_.Find(reinterpret_cast<uintptr_t>(tensor.ptr()));
    const Place place = object != ByAddress::kNone ? state_.tensors_[tensor_of_[object]]
                                                   : state_.PlaceOf(tensor.ptr(), nullptr);
    const size_t number = numbers_.Find(place.address);
    if (number == ByAddress::kNone || owners_[number].bytes >= place.bytes) return;
    owners_[number] = {tensor, place.bytes, place.versions};
  }

  const LiveState& state_;
  ByAddress numbers_;              // of the tensors' addresses
  ByAddress objects_;              // of the tensors themselves
  std::vector<size_t> owner_of_;   // by tensor
  std::vector<size_t> tensor_of_;  // by object
  std::vector<Owner> owners_;      // by the number of an address
};

LiveState::Guarded LiveState::FindGuarded(const py::object& parameters,
                                          const py::object& optimizers) const {
  std::unordered_set<PyObject*> ours;
  for (const py::handle list : parameters) {
    for (const py::handle parameter : list) ours.insert(parameter.ptr());
  }
  Owners owners(*this);
  for (const py::handle optimizer : optimizers) owners.AddOptimizer(optimizer, ours);
  Guarded out{std::make_shared<Watch>(memory_), {}, 0};
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (const Owners::Owner* owner = owners.Of(i)) {
      out.watch->Add(owner->tensor, i, owner->versions);
      continue;
    }
    out.unguarded.push_back(i);
    PyObject* const value = values_[tensors_[i].value].ptr();
    const py::object local = LocalOf(value);
    out.unguarded_bytes +=
        static_cast<int64_t>(THPVariable_Unpack(local ? local.ptr() : value).nbytes());
  }
  return out;
}

std::shared_ptr<snapshot::StagingCopy> LiveState::Copies(const StagingParts& parts, size_t skip,
                                                         uintptr_t image,
                                                         const std::vector<int64_t>& places,
                                                         const std::vector<size_t>& tensors) const {
  std::vector<bool> wanted(tensors_.size());
  for (const size_t tensor : tensors) wanted.at(tensor) = true;
  TORCH_CHECK(places.size() == parts.parts.size(), "each part has a place");
  std::vector<snapshot::CopyPiece> pieces;
  pieces.reserve(places.size());
  for (size_t i = skip; i < places.size(); ++i) {
    const StagingParts::Part& part = parts.parts[i];
    const Place& tensor = tensors_.at(part.tensor);
    if (!wanted[part.tensor] || part.size == 0 || !tensor.on_cpu) continue;
    TORCH_INTERNAL_ASSERT(part.first + part.size <= tensor.bytes);
    pieces.push_back(
        {reinterpret_cast<const std::byte*>(tensor.address + static_cast<uintptr_t>(part.first)),
         reinterpret_cast<std::byte*>(image + static_cast<uintptr_t>(places[i])), part.size});
  }
  return std::make_shared<snapshot::StagingCopy>(pieces);
}

}  // namespace hsdp_ckpt::python
