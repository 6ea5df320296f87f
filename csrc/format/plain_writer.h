#pragma once

#include "format/metadata.h"
#include "format/pickle_writer.h"

namespace hsdp_ckpt::format {

/// Writes planner data. A container that has several parents is written once and named after that.
/// Throws Error for nodes that are not in order or nested deeper than kMaxPlainDepth.
void WritePlainData(PickleWriter& out, const PlainData& data);

}  // namespace hsdp_ckpt::format
