#include "format/pickle_call.h"

#include <algorithm>
#include <utility>

#include "format/types.h"
#include "pickle/text.h"

namespace hsdp_ckpt::format {
namespace {

using Kind = PickleGraph::Kind;
using Id = PickleGraph::Id;
using Items = std::span<const Id>;

bool Is(const PickleGraph& graph, Id id, Kind kind) { return graph.kind(id) == kind; }

bool IsGlobal(const PickleGraph& graph, Id id, PickleGlobal global) {
  return Is(graph, id, Kind::kGlobal) && graph.integer(id) == static_cast<int64_t>(global);
}

bool AreStrings(const PickleGraph& graph, Items items) {
  return std::all_of(items.begin(), items.end(),
                     [&](Id id) { return Is(graph, id, Kind::kString); });
}

// torch.Size, set and frozenset: of one tuple or list.
std::optional<Id> Collection(PickleGraph& graph, Kind kind, Items arguments) {
  if (arguments.size() != 1) return std::nullopt;
  const Kind given = graph.kind(arguments[0]);
  if (given != Kind::kTuple && given != Kind::kList) return std::nullopt;
  return graph.AddSameItems(kind, arguments[0]);
}

// torch.serialization._get_layout("torch.strided")
std::optional<Id> LayoutNode(PickleGraph& graph, Items arguments) {
  constexpr std::string_view kPrefix = "torch.";
  if (arguments.size() != 1 || !AreStrings(graph, arguments)) return std::nullopt;
  const std::string_view name = graph.text(arguments[0]);
  if (!name.starts_with(kPrefix)) return std::nullopt;
  const auto layout = LayoutFromName(name.substr(kPrefix.size()));
  if (!layout) return std::nullopt;
  return graph.Add(Kind::kLayout, static_cast<int64_t>(*layout));
}

// _MEM_FORMAT_ENCODING(0)
std::optional<Id> MemoryFormatByValue(PickleGraph& graph, Items arguments) {
  if (arguments.size() != 1 || !Is(graph, arguments[0], Kind::kInt)) return std::nullopt;
  const int64_t value = graph.integer(arguments[0]);
  if (value < 0 || value > static_cast<int64_t>(MemoryFormat::kPreserve)) return std::nullopt;
  return graph.Add(Kind::kMemoryFormat, value);
}

// getattr(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT"). Not attribute access in general: only a
// member of this one enum.
std::optional<Id> MemoryFormatByName(PickleGraph& graph, Items arguments) {
  if (arguments.size() != 2 || !IsGlobal(graph, arguments[0], PickleGlobal::kMemoryFormat) ||
      !Is(graph, arguments[1], Kind::kString)) {
    return std::nullopt;
  }
  const auto format = MemoryFormatFromName(graph.text(arguments[1]));
  if (!format) return std::nullopt;
  return graph.Add(Kind::kMemoryFormat, static_cast<int64_t>(*format));
}

// _codecs.encode("text", "latin1"), which is how protocols 0 to 2 write bytes.
std::optional<Id> EncodedBytes(PickleGraph& graph, Items arguments) {
  if (arguments.size() != 2 || !AreStrings(graph, arguments)) return std::nullopt;
  if (graph.text(arguments[1]) != "latin1") return std::nullopt;
  std::optional<std::string> bytes = pickle::EncodeLatin1(graph.text(arguments[0]));
  if (!bytes) return std::nullopt;
  return graph.AddOwnedText(Kind::kBytes, *std::move(bytes));
}

}  // namespace

std::optional<Id> EvaluateCall(PickleGraph& graph, Id function, Id arguments) {
  const Items items = graph.items(arguments);
  switch (static_cast<PickleGlobal>(graph.integer(function))) {
    case PickleGlobal::kSize:
      return Collection(graph, Kind::kSize, items);
    case PickleGlobal::kSet:
      return Collection(graph, Kind::kSet, items);
    case PickleGlobal::kFrozenSet:
      return Collection(graph, Kind::kFrozenSet, items);
    case PickleGlobal::kGetLayout:
      return LayoutNode(graph, items);
    case PickleGlobal::kMemoryFormat:
      return MemoryFormatByValue(graph, items);
    case PickleGlobal::kGetattr:
      return MemoryFormatByName(graph, items);
    case PickleGlobal::kPathlib:
      if (!AreStrings(graph, items)) return std::nullopt;
      return graph.AddPath(function, arguments);
    case PickleGlobal::kBytes:
      if (!items.empty()) return std::nullopt;
      return graph.AddText(Kind::kBytes, "");
    case PickleGlobal::kCodecsEncode:
      return EncodedBytes(graph, items);
    default:
      return std::nullopt;
  }
}

std::optional<Id> InstanceClass(const PickleGraph& graph, Id function, Id arguments) {
  const Items items = graph.items(arguments);
  if (IsGlobal(graph, function, PickleGlobal::kNewObject))
    return items.size() == 1 ? std::optional(items[0]) : std::nullopt;
  // copyreg._reconstructor(class, object, None)
  if (items.size() != 3 || !IsGlobal(graph, items[1], PickleGlobal::kObject) ||
      !Is(graph, items[2], Kind::kNone)) {
    return std::nullopt;
  }
  return items[0];
}

}  // namespace hsdp_ckpt::format
