#pragma once

#include "format/metadata.h"
#include "python/module.h"

namespace hsdp_ckpt::python {

/// DCP's `Metadata` with the same content. Needs the GIL.
pybind11::object MetadataToPython(const format::Metadata& metadata);

}  // namespace hsdp_ckpt::python
