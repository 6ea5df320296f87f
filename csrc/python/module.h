#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

// What each bind_*.cpp adds to the module. No logic here: arguments are converted, the GIL is
// released, a room is called.
namespace hsdp_ckpt::python {

void BindCheckpoint(pybind11::module_& module);
void BindErrors(pybind11::module_& module);
void BindHsdp(pybind11::module_& module);
void BindLoad(pybind11::module_& module);
void BindMetadata(pybind11::module_& module);
void BindObjects(pybind11::module_& module);
void BindParameters(pybind11::module_& module);
void BindPlan(pybind11::module_& module);
void BindReader(pybind11::module_& module);
void BindSnapshot(pybind11::module_& module);
void BindVerify(pybind11::module_& module);
#ifdef HSDP_CKPT_TESTS
void BindTestHooks(pybind11::module_& module);
#endif

}  // namespace hsdp_ckpt::python
