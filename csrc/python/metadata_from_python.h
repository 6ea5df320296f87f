#pragma once

#include <optional>

#include "format/metadata.h"
#include "python/module.h"

namespace hsdp_ckpt::python {

/// DCP's `Metadata` object as the C++ one. Nothing if any part is not exactly of the type that DCP
/// itself gives it (a subclass, a tuple for a torch.Size, another class): the C++ value would then
/// not be equal to the Python one. Needs the GIL.
std::optional<format::Metadata> MetadataFromPython(const pybind11::object& metadata);

}  // namespace hsdp_ckpt::python
