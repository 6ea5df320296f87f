#include "format/plain_reader.h"

namespace hsdp_ckpt::format {
namespace {

using Kind = PickleGraph::Kind;
using Id = PickleGraph::Id;
constexpr uint64_t kUnknown = std::numeric_limits<uint64_t>::max();

class PlainReader {
 public:
  explicit PlainReader(GraphReader& reader)
      : reader_(reader), graph_(reader.graph()), ids_(graph_.size(), kAbsent) {}

  PlainData Read(Id id, const Where& where) {
    Node(id, where, 0);
    return std::move(data_);
  }

 private:
  Id Node(Id id, const Where& where, int depth) {
    constexpr Id kInProgress = kAbsent - 1;
    if (ids_[id] == kInProgress) reader_.Fail(where, "plain data", "a value that contains itself");
    if (ids_[id] != kAbsent) return ids_[id];
    if (depth > kMaxPlainDepth)
      reader_.Fail(where, "at most " + std::to_string(kMaxPlainDepth) + " levels", "more");
    ids_[id] = kInProgress;
    PlainData::Node node = Value(id, where, depth);
    // A shared value was decoded where it came first, perhaps not as deep: what counts is how deep
    // the finished value is.
    int levels = 0;
    if (const auto* container = std::get_if<PlainData::Container>(&node)) {
      for (const auto item : container->items) levels = std::max(levels, levels_[item] + 1);
    }
    if (levels > kMaxPlainDepth)
      reader_.Fail(where, "at most " + std::to_string(kMaxPlainDepth) + " levels", "more");
    levels_.push_back(levels);
    data_.nodes.push_back(std::move(node));
    return ids_[id] = static_cast<Id>(data_.nodes.size() - 1);
  }

  PlainData::Node Value(Id id, const Where& where, int depth) {
    using ContainerKind = PlainData::Kind;
    switch (graph_.kind(id)) {
      case Kind::kNone:
        return PlainData::None{};
      case Kind::kBool:
        return graph_.integer(id) != 0;
      case Kind::kInt:
        return graph_.integer(id);
      case Kind::kBigInt:
        return PlainData::BigInt{std::string(graph_.text(id))};
      case Kind::kFloat:
        return graph_.real(id);
      case Kind::kString:
        return std::string(graph_.text(id));
      case Kind::kBytes:
        return PlainData::Bytes{std::string(graph_.text(id))};
      case Kind::kTuple:
        return Container(ContainerKind::kTuple, id, where, depth);
      case Kind::kList:
        return Container(ContainerKind::kList, id, where, depth);
      case Kind::kDict:
        return Container(ContainerKind::kDict, id, where, depth);
      case Kind::kSet:
        return Container(ContainerKind::kSet, id, where, depth);
      case Kind::kFrozenSet:
        return Container(ContainerKind::kFrozenSet, id, where, depth);
      default:
        reader_.Fail(where, "plain data", KindName(graph_.kind(id)));
    }
  }

  PlainData::Node Container(PlainData::Kind kind, Id id, const Where& where, int depth) {
    PlainData::Container container{kind, {}};
    const auto items = graph_.items(id);
    container.items.reserve(items.size());
    for (size_t i = 0; i < items.size(); ++i) {
      const Id item = Node(items[i], where, depth + 1);
      if (IsKey(kind, i)) SpendHash(item, graph_.kind(items[i]), where);
      container.items.push_back(item);
    }
    return container;
  }
  static bool IsKey(PlainData::Kind container, size_t item) {
    if (container == PlainData::Kind::kDict) return item % 2 == 0;
    return container == PlainData::Kind::kSet || container == PlainData::Kind::kFrozenSet;
  }

  void SpendHash(Id key, Kind kind, const Where& where) {
    const uint64_t work = HashWork(key);
    if (work == 0) reader_.Fail(where, "keys that Python can hash", KindName(kind));
    reader_.Spend(work, where);
  }
  // How many values hashing this one visits: Python unfolds shared tuples every time. 0 if it
  // cannot be hashed. Asked for keys only, whose parts were decoded before them; remembered, so
  // that asking does not unfold anything itself.
  uint64_t HashWork(Id id) {
    hash_work_.resize(data_.nodes.size(), kUnknown);
    if (hash_work_[id] != kUnknown) return hash_work_[id];
    const auto* container = std::get_if<PlainData::Container>(&data_.nodes[id]);
    const uint64_t work = container == nullptr ? 1 : ContainerHashWork(*container);
    hash_work_[id] = work;
    return work;
  }
  uint64_t ContainerHashWork(const PlainData::Container& container) {
    const bool hashable =
        container.kind == PlainData::Kind::kTuple || container.kind == PlainData::Kind::kFrozenSet;
    if (!hashable) return 0;
    uint64_t work = 1;
    for (const PlainData::Id id : container.items) {
      const uint64_t item = HashWork(id);
      if (item == 0) return 0;
      work = std::min(work + item, kUnknown / 4);
    }
    return work;
  }

  GraphReader& reader_;
  const PickleGraph& graph_;
  PlainData data_;
  std::vector<Id> ids_;      // by node of the graph: the node of data_ that it became
  std::vector<int> levels_;  // by node of data_: how many levels lie below it
  std::vector<uint64_t> hash_work_;
};

}  // namespace

PlainData ReadPlainData(GraphReader& reader, Id id, const Where& where) {
  if (id == kAbsent) {
    PlainData none;
    none.nodes.emplace_back(PlainData::None{});
    return none;
  }
  return PlainReader(reader).Read(id, where);
}

}  // namespace hsdp_ckpt::format
