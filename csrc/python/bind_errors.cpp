// C++ exceptions to Python's: IoError becomes OSError with errno and filename, the others the
// package's own types.
#include <torch/csrc/Exceptions.h>

#include <cstring>

#include "base/error.h"
#include "base/printable.h"
#include "python/module.h"
#include "python/text_for_people.h"

namespace py = pybind11;

namespace hsdp_ckpt::python {
namespace {

// The Python types live as long as the interpreter: created once in `torch_hsdp_ckpt.errors`,
// looked up at the first use.
py::object ErrorType(const char* name) {
  return py::module_::import("torch_hsdp_ckpt.errors").attr(name);
}

// A damaged file's names need not be UTF-8, and an error about them is to be no other error;
// nor is a name to do anything to the terminal that shows the message.
py::object Text(const std::exception& error) { return TextForPeople(error.what()); }

// As Python's own functions name files, which need not be UTF-8 either.
py::object FileName(const std::string& path) {
  return py::reinterpret_steal<py::object>(
      PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<Py_ssize_t>(path.size())));
}

void Raise(const py::object& exception) {
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(exception.ptr())), exception.ptr());
}

}  // namespace

py::object TextForPeople(const std::string& text) {
  const std::string shown = base::Printable(text);
  return py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(
      shown.data(), static_cast<Py_ssize_t>(shown.size()), "backslashreplace"));
}

void BindErrors(py::module_&) {
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    if (!pointer) return;
    try {
      std::rethrow_exception(pointer);
    } catch (const base::IoError& error) {
      // OSError(errno, message, filename): Python picks the subclass (FileNotFoundError,
      // PermissionError, ...).
      const std::string message =
          std::string(std::strerror(error.error_number())) + " (" + error.op() +
          (error.offset() < 0 ? "" : " at offset " + std::to_string(error.offset())) + ")";
      Raise(py::module_::import("builtins")
                .attr("OSError")(error.error_number(), message, FileName(error.path())));
    } catch (const base::CorruptionError& error) {
      Raise(ErrorType("CorruptCheckpointError")(Text(error)));
    } catch (const base::Error& error) {
      Raise(ErrorType("CheckpointError")(Text(error)));
    } catch (const c10::Error&) {
      // As torch's own functions raise it: without the C++ stack, unless TORCH_SHOW_CPP_STACKTRACES
      // asks for it.
      torch::translate_exception_to_python(pointer);
    }
  });
}

}  // namespace hsdp_ckpt::python
