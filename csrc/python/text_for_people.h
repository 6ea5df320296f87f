#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace hsdp_ckpt::python {

/// Text that may name files, which need not be UTF-8, and is for people: what is no UTF-8, or would
/// do something to a terminal, is escaped.
pybind11::object TextForPeople(const std::string& text);

}  // namespace hsdp_ckpt::python
