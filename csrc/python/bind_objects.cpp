// Objects of a checkpoint, for torch_hsdp_ckpt/checkpoint/storage/object_builder.py. Plain data is
// made here; names, calls, states and whatever hashes more than a str are asked of `hooks`, which
// alone knows what a pickle may name. The GIL is held: values are Python's.
#include <set>

#include "base/bytes.h"
#include "format/object_archive.h"
#include "pickle/object_machine.h"
#include "python/module.h"

namespace py = pybind11;

namespace hsdp_ckpt::python {
namespace {

constexpr uint64_t kStepsBetweenSignals = 1 << 16;

/// What pickle::ObjectMachine needs; `hooks` is an object of Python's with the methods named here.
class PythonBuilder {
 public:
  using Value = py::object;

  explicit PythonBuilder(const py::object& hooks)
      : function_type_(hooks.attr("function_type")),
        find_(hooks.attr("find")),
        call_(hooks.attr("call")),
        new_(hooks.attr("new")),
        set_state_(hooks.attr("set_state")),
        storage_(hooks.attr("storage")),
        append_(hooks.attr("append")),
        check_key_(hooks.attr("check_key")),
        set_item_(hooks.attr("set_item")),
        add_(hooks.attr("add")) {}

  static Value None() { return py::none(); }
  static Value Bool(bool value) { return py::bool_(value); }
  static Value Int(int64_t value) { return py::int_(value); }
  static Value Float(double value) { return py::float_(value); }
  static Value LargeInt(std::string_view two_complement) {
    const py::object type =
        py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(&PyLong_Type));
    return type.attr("from_bytes")(Bytes(two_complement), "little", py::arg("signed") = true);
  }
  static Value Text(std::string_view utf8) {
    return Made(PyUnicode_DecodeUTF8(utf8.data(), Size(utf8), "surrogatepass"));
  }
  static Value Bytes(std::string_view bytes) { return py::bytes(bytes.data(), bytes.size()); }
  static Value ByteArray(std::string_view bytes) {
    return py::bytearray(bytes.data(), bytes.size());
  }
  Value Tuple(std::span<Value> items) {
    py::tuple tuple(items.size());
    for (size_t i = 0; i < items.size(); ++i) tuple[i] = items[i];
    return tuple;
  }
  static Value List() { return py::list(); }
  static Value Dict() { return py::dict(); }
  static Value Set() { return py::set(); }
  Value FrozenSet(std::span<Value> items) {
    const py::object set = py::set();
    add_(set, ListOf(items));
    return Made(PyFrozenSet_New(set.ptr()));
  }
  Value Global(std::string_view module, std::string_view attribute) const {
    return find_(Text(module), Text(attribute));
  }
  Value DottedGlobal(const Value& module, const Value& attribute) {
    return find_(module, attribute);
  }
  bool IsFunction(const Value& value) const {
    return reinterpret_cast<PyObject*>(Py_TYPE(value.ptr())) == function_type_.ptr();
  }
  Value Call(const Value& function, const Value& arguments) { return call_(function, arguments); }
  Value New(const Value& type, const Value& arguments) { return new_(type, arguments); }
  Value Storage(const Value& id) const { return storage_(id); }

  void Append(Value& list, std::span<Value> items) {
    if (!PyList_CheckExact(list.ptr())) {
      append_(list, ListOf(items));
      return;
    }
    for (const Value& item : items) Check(PyList_Append(list.ptr(), item.ptr()));
  }
  void SetItems(Value& dict, std::span<Value> items) {
    for (size_t i = 0; i + 1 < items.size(); i += 2) {
      // One opcode may bring as many items as the pickle has bytes, and interrupts wait meanwhile.
      if (i % kStepsBetweenSignals == 0) Check(PyErr_CheckSignals());
      SetItem(dict, items[i], items[i + 1]);
    }
  }
  void AddItems(Value& set, std::span<Value> items) { add_(set, ListOf(items)); }
  void SetState(Value& object, const Value& state) { set_state_(object, state); }

 private:
  static Value Made(PyObject* object) {
    if (object == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(object);
  }
  static void Check(int result) {
    if (result != 0) throw py::error_already_set();
  }
  static Py_ssize_t Size(std::string_view text) { return static_cast<Py_ssize_t>(text.size()); }
  static py::list ListOf(std::span<Value> items) {
    py::list list(items.size());
    for (size_t i = 0; i < items.size(); ++i) list[i] = items[i];
    return list;
  }
  void SetItem(Value& dict, const Value& key, const Value& value) {
    if (!PyDict_CheckExact(dict.ptr())) {
      set_item_(dict, key, value);
      return;
    }
    // A str's hash is its own and nobody can foresee it.
    if (!PyUnicode_CheckExact(key.ptr())) check_key_(dict, key);
    Check(PyDict_SetItem(dict.ptr(), key.ptr(), value.ptr()));
  }

  py::object function_type_, find_, call_, new_, set_state_, storage_, append_, check_key_,
      set_item_, add_;
};

std::span<const std::byte> BytesOf(const py::buffer_info& buffer) {
  return {static_cast<const std::byte*>(buffer.ptr),
          static_cast<size_t>(buffer.size * buffer.itemsize)};
}

// The pickle's value, and the bytes that it takes.
std::pair<py::object, size_t> BuildObject(const py::buffer& data, size_t first, size_t size,
                                          const std::string& what, const py::object& hooks) {
  const py::buffer_info buffer = data.request();
  const auto bytes = BytesOf(buffer);
  if (first > bytes.size()) throw py::value_error("a range outside the bytes");
  const auto pickle = bytes.subspan(first, std::min(size, bytes.size() - first));
  PythonBuilder builder(hooks);
  pickle::ObjectMachine<PythonBuilder> machine(pickle, what, builder);
  for (uint64_t steps = 1; machine.Step(); ++steps) {
    if (steps % kStepsBetweenSignals == 0 && PyErr_CheckSignals() != 0)
      throw py::error_already_set();
  }
  return {machine.result(), machine.consumed()};
}

// What the pickle names, as (module, name), without anything being made; of names that STACK_GLOBAL
// puts together from strs there is ("", "").
std::set<std::pair<std::string, std::string>> PickleNames(const py::buffer& data, size_t first,
                                                          size_t size, const std::string& what) {
  const py::buffer_info buffer = data.request();
  const auto bytes = BytesOf(buffer);
  if (first > bytes.size()) throw py::value_error("a range outside the bytes");
  pickle::Tokenizer tokens(bytes.subspan(first, std::min(size, bytes.size() - first)), what,
                           pickle::Opcodes::kAll);
  std::set<std::pair<std::string, std::string>> names;
  for (auto token = tokens.Next(); token.op != pickle::Op::kStop; token = tokens.Next()) {
    if (token.op == pickle::Op::kGlobal) names.emplace(token.text, token.second_line);
    if (token.op == pickle::Op::kStackGlobal) names.emplace("", "");
  }
  return names;
}

std::optional<std::map<std::string, std::pair<uint64_t, uint64_t>>> ObjectArchive(
    const py::buffer& data, const std::string& what) {
  const py::buffer_info buffer = data.request();
  const auto entries = format::ReadObjectArchive(BytesOf(buffer), what);
  if (!entries) return std::nullopt;
  std::map<std::string, std::pair<uint64_t, uint64_t>> places;
  for (const auto& [name, entry] : *entries) places[name] = {entry.offset, entry.size};
  return places;
}

}  // namespace

void BindObjects(py::module_& module) {
  module.def("build_object", &BuildObject, py::arg("data"), py::arg("first"), py::arg("size"),
             py::arg("what"), py::arg("hooks"));
  module.def("pickle_names", &PickleNames, py::arg("data"), py::arg("first"), py::arg("size"),
             py::arg("what"));
  module.def("object_archive", &ObjectArchive, py::arg("data"), py::arg("what"));
}

}  // namespace hsdp_ckpt::python
