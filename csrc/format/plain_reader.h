#pragma once

#include "format/graph_reader.h"
#include "format/metadata.h"

namespace hsdp_ckpt::format {

/// The plain data below node `id`; None for kAbsent. A value that Python shares becomes one node
/// here, too, so the work is that of the graph and not of the tree it unfolds to. Throws
/// CorruptionError for anything else than plain data, for a value that contains itself, for more
/// than kMaxPlainDepth levels, and for keys that Python can't hash or not in proportion to the
/// file.
PlainData ReadPlainData(GraphReader& reader, PickleGraph::Id id, const Where& where);

}  // namespace hsdp_ckpt::format
