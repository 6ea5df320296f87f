#pragma once

#include <optional>

#include "format/pickle_graph.h"

namespace hsdp_ckpt::format {

/// What REDUCE would make of `function`, a callable global, and the tuple `arguments`, as a new
/// node of `graph`. Nothing is called: each of the few callables that a `.metadata` may name is
/// known here. Nullopt for arguments that such a pickle never passes. Not for copyreg's callables.
std::optional<PickleGraph::Id> EvaluateCall(PickleGraph& graph, PickleGraph::Id function,
                                            PickleGraph::Id arguments);

/// The class that copyreg's `_reconstructor` or `__newobj__`, as `function`, makes an instance of.
/// Nullopt as above. Whether it is a class is the caller's to check.
std::optional<PickleGraph::Id> InstanceClass(const PickleGraph& graph, PickleGraph::Id function,
                                             PickleGraph::Id arguments);

}  // namespace hsdp_ckpt::format
