#include "format/plain_writer.h"

#include "base/error.h"

namespace hsdp_ckpt::format {
namespace {

using pickle::Op;

// Which nodes are part of several others, or of one several times.
std::vector<bool> SharedNodes(const PlainData& data) {
  std::vector<bool> seen(data.nodes.size()), shared(data.nodes.size());
  for (size_t id = 0; id < data.nodes.size(); ++id) {
    const auto* container = std::get_if<PlainData::Container>(&data.nodes[id]);
    if (container == nullptr) continue;
    for (const PlainData::Id item : container->items) {
      if (item >= id)
        throw base::Error("planner data: a value that does not come before the one it is part of");
      if (seen[item]) shared[item] = true;
      seen[item] = true;
    }
  }
  return shared;
}

class PlainWriter {
 public:
  PlainWriter(PickleWriter& out, const PlainData& data)
      : out_(out), data_(data), shared_(SharedNodes(data)), slots_(data.nodes.size(), kUnsetSlot) {}

  void Node(PlainData::Id id, int depth) {
    if (depth > kMaxPlainDepth)
      throw base::Error("planner data: more than " + std::to_string(kMaxPlainDepth) + " levels");
    if (out_.Recall(slots_[id])) return;
    const PlainData::Node& node = data_.nodes[id];
    if (const auto* container = std::get_if<PlainData::Container>(&node)) {
      Container(*container, depth);
      if (shared_[id]) out_.Memoize(slots_[id]);
    } else {
      std::visit(Leaf{out_}, node);
    }
  }

 private:
  struct Leaf {
    PickleWriter& out;
    void operator()(PlainData::None) const { out.Put(Op::kNone); }
    void operator()(bool value) const { out.Bool(value); }
    void operator()(int64_t value) const { out.Int(value); }
    void operator()(double value) const { out.Float(value); }
    void operator()(const std::string& value) const { out.Str(value); }
    void operator()(const PlainData::Bytes& bytes) const { out.Bytes(bytes.value); }
    void operator()(const PlainData::BigInt& big) const { out.BigInt(big.two_complement); }
    void operator()(const PlainData::Container&) const {}  // not a leaf
  };

  void Container(const PlainData::Container& container, int depth) {
    using Kind = PlainData::Kind;
    switch (container.kind) {
      case Kind::kTuple:
        if (container.items.empty()) return out_.Put(Op::kEmptyTuple);
        return Items(container, depth, Op::kTuple);
      case Kind::kList:
        out_.Put(Op::kEmptyList);
        return Items(container, depth, Op::kAppends);
      case Kind::kDict:
        out_.Put(Op::kEmptyDict);
        return Items(container, depth, Op::kSetItems);
      case Kind::kSet:
        out_.Put(Op::kEmptySet);
        return Items(container, depth, Op::kAddItems);
      case Kind::kFrozenSet:
        return Items(container, depth, Op::kFrozenSet);
    }
  }
  void Items(const PlainData::Container& container, int depth, Op end) {
    out_.Put(Op::kMark);
    for (const PlainData::Id item : container.items) Node(item, depth + 1);
    out_.Put(end);
  }

  PickleWriter& out_;
  const PlainData& data_;
  std::vector<bool> shared_;
  std::vector<MemoSlot> slots_;
};

}  // namespace

void WritePlainData(PickleWriter& out, const PlainData& data) {
  if (data.nodes.empty()) return out.Put(Op::kNone);
  PlainWriter(out, data).Node(static_cast<PlainData::Id>(data.nodes.size() - 1), 0);
}

}  // namespace hsdp_ckpt::format
