#pragma once

#include "metadata/metadata.h"
#include "python/module.h"

namespace hsdp_ckpt {

/// DCP's `Metadata` with the same content. Needs the GIL.
pybind11::object MetadataToPython(const Metadata& metadata);

}  // namespace hsdp_ckpt
