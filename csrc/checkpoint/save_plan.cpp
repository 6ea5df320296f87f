#include "checkpoint/save_plan.h"

#include <algorithm>
#include <functional>
#include <iterator>
#include <map>
#include <numeric>
#include <unordered_map>

#include "base/error.h"
#include "checkpoint/file_index.h"
#include "record/record.h"
#include "record/tensor_pickle.h"

namespace hsdp_ckpt {
namespace {

int64_t Product(const Shape& sizes, size_t from = 0) {
  return std::accumulate(sizes.begin() + static_cast<std::ptrdiff_t>(std::min(from, sizes.size())), sizes.end(), int64_t{1},
                         std::multiplies<>());
}

// Calls with each coordinate of the sharding dimensions; those of replicating dimensions stay 0.
void ForEachShard(const Sharding& sharding, const std::function<void(const std::vector<int64_t>&)>& call) {
  std::vector<int64_t> at(sharding.mesh_shape.size(), 0);
  for (;;) {
    call(at);
    size_t i = at.size();
    for (; i > 0; --i) {
      if (sharding.shard_dims[i - 1] < 0) continue;
      if (++at[i - 1] < sharding.mesh_shape[i - 1]) break;
      at[i - 1] = 0;
    }
    if (i == 0) return;
  }
}

// Elements that a cut moves in: a row of the first dimension longer than 1, or of a later one where rows are large.
int64_t Grain(const Shape& sizes, int64_t element) {
  size_t dim = 0;
  while (dim < sizes.size() && sizes[dim] == 1) ++dim;
  while (dim + 1 < sizes.size() && Product(sizes, dim + 1) * element > SavePlan::kCutGrain) ++dim;
  return Product(sizes, dim + 1);
}

// The boxes that make up elements [from, to) of a contiguous box, in order. One where from and to are whole rows.
void AddBoxes(size_t tensor, const Shape& offsets, const Shape& sizes, size_t dim, int64_t from, int64_t to,
              std::vector<Piece>& out) {
  const int64_t row = Product(sizes, dim + 1);
  const auto rows = [&](int64_t first, int64_t count) {
    Piece piece{tensor, offsets, sizes};
    piece.offsets[dim] += first;
    piece.sizes[dim] = count;
    return piece;
  };
  const auto inside = [&](int64_t first, int64_t begin, int64_t end) {
    const Piece one = rows(first, 1);
    AddBoxes(tensor, one.offsets, one.sizes, dim + 1, begin, end, out);
  };
  const int64_t first = (from + row - 1) / row, last = to / row;
  if (first > last) return inside(last, from - last * row, to - last * row);
  if (from % row != 0) inside(first - 1, from % row, row);
  if (last > first) out.push_back(rows(first, last - first));
  if (to % row != 0) inside(last, 0, to % row);
}

}  // namespace

SavePlan::SavePlan(std::vector<Sharding> shardings, std::vector<PlannedTensor> tensors)
    : shardings_(std::move(shardings)), tensors_(std::move(tensors)), of_sharding_(shardings_.size()) {
  for (size_t i = 0; i < tensors_.size(); ++i) of_sharding_.at(tensors_[i].sharding).push_back(i);
  for (size_t i = 0; i < shardings_.size(); ++i) {
    if (of_sharding_[i].empty()) continue;
    const Sharding& sharding = shardings_[i];
    if (sharding.shard_dims.size() != sharding.mesh_shape.size() ||
        Product(sharding.mesh_shape) != static_cast<int64_t>(sharding.ranks.size())) {
      throw Error("a mesh whose shape, ranks and placements do not fit together");
    }
    ForEachShard(sharding, [&](const Coordinates& at) {
      if (!Holders(sharding, at).empty()) return;
      for (const size_t index : of_sharding_[i]) {
        Piece box{index, {}, {}};
        Box(tensors_[index], at, &box.offsets, &box.sizes);
        if (Product(box.sizes) == 0) continue;
        std::string where;
        for (const int64_t offset : box.offsets) where += (where.empty() ? "" : ", ") + std::to_string(offset);
        throw Error(tensors_[index].fqn + ": no rank of the saving process group holds its shard at [" + where +
                    "]; save through a group that has every shard, such as one shard group or all ranks");
      }
    });
  }
}

// Left to right over the mesh's dimensions, in chunks of ceil(size / parts), as DTensor and torch.chunk have it.
void SavePlan::Box(const PlannedTensor& tensor, const Coordinates& at, Shape* offsets, Shape* sizes) const {
  const Sharding& sharding = shardings_[tensor.sharding];
  offsets->assign(tensor.size.size(), 0);
  *sizes = tensor.size;
  for (size_t i = 0; i < at.size(); ++i) {
    if (sharding.shard_dims[i] < 0) continue;
    const auto dim = static_cast<size_t>(sharding.shard_dims[i]);
    if (dim >= sizes->size()) throw Error(tensor.fqn + ": sharded along a dimension that it has not");
    int64_t& size = (*sizes)[dim];
    const int64_t chunk = (size + sharding.mesh_shape[i] - 1) / sharding.mesh_shape[i];
    const int64_t begin = std::min(chunk * at[i], size);
    (*offsets)[dim] += begin;
    size = std::min(chunk, size - begin);
  }
}

// The ranks of the saving group with these shard coordinates, in mesh order.
std::vector<int64_t> SavePlan::Holders(const Sharding& sharding, const Coordinates& at) const {
  std::vector<int64_t> holders;
  Coordinates each = at;
  for (;;) {
    int64_t flat = 0;
    for (size_t i = 0; i < each.size(); ++i) flat = flat * sharding.mesh_shape[i] + each[i];
    if (const int64_t rank = sharding.ranks[static_cast<size_t>(flat)]; rank >= 0) holders.push_back(rank);
    size_t i = each.size();
    for (; i > 0; --i) {
      if (sharding.shard_dims[i - 1] >= 0) continue;
      if (++each[i - 1] < sharding.mesh_shape[i - 1]) break;
      each[i - 1] = 0;
    }
    if (i == 0) return holders;
  }
}

// What each of a shard's holders writes of the tensors of one sharding.
std::vector<std::vector<Piece>> SavePlan::Split(size_t sharding, const Coordinates& at, size_t holders) const {
  const std::vector<size_t>& tensors = of_sharding_[sharding];
  const bool first_shard = std::all_of(at.begin(), at.end(), [](int64_t c) { return c == 0; });
  std::vector<Piece> boxes;
  std::vector<int64_t> bytes;
  int64_t total = 0;
  for (const size_t index : tensors) {
    Piece box{index, {}, {}};
    Box(tensors_[index], at, &box.offsets, &box.sizes);
    bytes.push_back(TensorBytes(*tensors_[index].dtype, box.sizes));
    total += bytes.back();
    boxes.push_back(std::move(box));
  }
  std::vector<std::vector<Piece>> out(holders);
  const auto parts = static_cast<int64_t>(holders);
  size_t holder = 0;
  const auto bound = [&](size_t after) {  // where the part of holder `after` ends
    const auto r = static_cast<int64_t>(after) + 1;
    return r == parts ? total : total / parts * r + total % parts * r / parts;
  };
  int64_t begin = 0;  // of the tensor at hand, in the shard's bytes end to end
  for (size_t i = 0; i < boxes.size(); ++i) {
    const Piece& box = boxes[i];
    if (bytes[i] == 0) {
      // Other shards' empty parts say nothing; a tensor without elements has one chunk, so that it is in the checkpoint.
      if (first_shard && Product(tensors_[box.tensor].size) == 0) out[holder].push_back(box);
      continue;
    }
    const int64_t element = tensors_[box.tensor].dtype->size;
    const int64_t grain = shardings_[sharding].whole ? bytes[i] : Grain(box.sizes, element) * element;
    int64_t from = 0;
    while (holder + 1 < holders && bound(holder) < begin + bytes[i]) {
      int64_t cut = std::max<int64_t>(bound(holder) - begin, 0);
      cut = (cut + grain / 2) / grain * grain;
      // Slivers are not worth a record, nor a chunk in the metadata.
      if (cut < kCutMargin && cut < bytes[i] - cut) cut = 0;
      if (bytes[i] - cut < kCutMargin && bytes[i] - cut <= cut) cut = bytes[i];
      cut = std::clamp(cut, from, bytes[i]);
      if (cut == bytes[i]) break;  // the whole rest is this holder's, the next one begins behind it
      if (cut > from) AddBoxes(box.tensor, box.offsets, box.sizes, 0, from / element, cut / element, out[holder]);
      from = cut;
      ++holder;
    }
    if (from == 0) {
      out[holder].push_back(box);
    } else {
      AddBoxes(box.tensor, box.offsets, box.sizes, 0, from / element, bytes[i] / element, out[holder]);
    }
    begin += bytes[i];
    while (holder + 1 < holders && bound(holder) <= begin) ++holder;
  }
  return out;
}

std::optional<SavePlan::Coordinates> SavePlan::CoordinatesOf(const Sharding& sharding, int64_t rank) {
  const auto found = std::find(sharding.ranks.begin(), sharding.ranks.end(), rank);
  if (found == sharding.ranks.end()) return std::nullopt;
  Coordinates at(sharding.mesh_shape.size());
  auto flat = static_cast<int64_t>(found - sharding.ranks.begin());
  for (size_t dim = at.size(); dim > 0; --dim) {
    // Replicas share the coordinates of their shard.
    at[dim - 1] = sharding.shard_dims[dim - 1] < 0 ? 0 : flat % sharding.mesh_shape[dim - 1];
    flat /= sharding.mesh_shape[dim - 1];
  }
  return at;
}

std::vector<Piece> SavePlan::PiecesOf(int64_t rank) const {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < shardings_.size(); ++i) {
    const auto at = of_sharding_[i].empty() ? std::nullopt : CoordinatesOf(shardings_[i], rank);
    if (!at) continue;
    const auto holders = Holders(shardings_[i], *at);
    const auto place = static_cast<size_t>(std::find(holders.begin(), holders.end(), rank) - holders.begin());
    auto parts = Split(i, *at, holders.size());
    std::move(parts[place].begin(), parts[place].end(), std::back_inserter(pieces));
  }
  return pieces;
}

std::vector<Piece> SavePlan::LocalShards(int64_t rank) const {
  std::vector<Piece> shards;
  for (size_t i = 0; i < shardings_.size(); ++i) {
    const auto at = CoordinatesOf(shardings_[i], rank);
    if (!at) continue;
    for (const size_t index : of_sharding_[i]) {
      auto& shard = shards.emplace_back(Piece{index, {}, {}});
      Box(tensors_[index], *at, &shard.offsets, &shard.sizes);
    }
  }
  return shards;
}

namespace {

// Sizes of framing by dtype and shape, which repeat from shard to shard: making a frame costs microseconds.
class RecordSizes {
 public:
  const RecordSize& Of(const DType& dtype, const Shape& sizes) {
    const auto found = known_.find({dtype.code, sizes});
    if (found != known_.end()) return found->second;
    return known_.emplace(std::pair(dtype.code, sizes), SizeOfRecord(dtype, sizes)).first->second;
  }

 private:
  std::map<std::pair<uint8_t, Shape>, RecordSize> known_;
};

std::vector<PlannedFile> LayoutFiles(const std::vector<PlannedTensor>& tensors, const std::vector<Piece>& pieces,
                                     const std::vector<int64_t>& objects, bool single_file, RecordSizes& sizes) {
  std::vector<PlannedFile> files;
  int64_t position = 0, index = 0;  // where the next record may begin, and how long the index is by now
  const auto close = [&] {
    if (!files.empty()) files.back().size = IndexStart(position) + index + kIndexTail;
  };
  const auto add = [&](int64_t offset, int64_t length, int64_t head, int64_t payload, size_t dimensions) {
    files.back().records.push_back({offset, length, offset + head});
    position = offset + length;
    index += IndexEntrySize(payload, dimensions);
  };
  const auto next = [&] {
    if (!files.empty() && single_file) return;
    close();
    files.emplace_back();
    position = index = 0;
  };
  for (const int64_t size : objects) {
    next();
    add(position, size, 0, size, 0);
  }
  for (const Piece& piece : pieces) {
    next();
    const RecordSize& size = sizes.Of(*tensors[piece.tensor].dtype, piece.sizes);
    add(RecordStart(position, size), size.total(), size.head, size.payload, piece.sizes.size());
  }
  close();
  return files;
}

}  // namespace

std::vector<PlannedFile> SavePlan::Layout(const std::vector<Piece>& pieces, const std::vector<int64_t>& objects,
                                          bool single_file) const {
  RecordSizes sizes;
  return LayoutFiles(tensors_, pieces, objects, single_file, sizes);
}

std::vector<std::pair<std::string, int64_t>> SavePlan::AddTo(Metadata& metadata, const std::vector<Writer>& writers,
                                                             uint64_t save_id, bool single_file) const {
  std::vector<std::vector<Piece>> by_rank(writers.size());
  for (size_t i = 0; i < shardings_.size(); ++i) {
    if (of_sharding_[i].empty()) continue;
    ForEachShard(shardings_[i], [&](const Coordinates& at) {
      const auto holders = Holders(shardings_[i], at);
      if (holders.empty()) return;  // the constructor has seen that there is nothing to write
      auto parts = Split(i, at, holders.size());
      for (size_t r = 0; r < holders.size(); ++r) {
        auto& own = by_rank.at(static_cast<size_t>(holders[r]));
        std::move(parts[r].begin(), parts[r].end(), std::back_inserter(own));
      }
    });
  }
  std::unordered_map<std::string, TensorMetadata*> entries;
  for (auto& [fqn, entry] : metadata.state_dict_metadata) {
    if (auto* tensor = std::get_if<TensorMetadata>(&entry)) entries.emplace(fqn, tensor);
  }
  auto& storage = metadata.storage_data ? *metadata.storage_data : metadata.storage_data.emplace();
  std::vector<std::pair<std::string, int64_t>> out;
  RecordSizes sizes;
  for (size_t rank = 0; rank < writers.size(); ++rank) {
    const Writer& writer = writers[rank];
    std::vector<int64_t> lengths;
    for (const auto& object : writer.objects) lengths.push_back(object.second);
    const auto files = LayoutFiles(tensors_, by_rank[rank], lengths, single_file, sizes);
    size_t record = 0;
    for (size_t number = 0; number < files.size(); ++number) {
      const std::string name =
          DataFileName{static_cast<int64_t>(rank), save_id, writer.owner, false, static_cast<int64_t>(number)}.ToString();
      out.emplace_back(name, files[number].size);
      for (const PlannedRecord& place : files[number].records) {
        StorageInfo info{name, place.offset, place.length, std::nullopt};
        if (record < writer.objects.size()) {
          storage.emplace_back(MetadataIndex{writer.objects[record].first, std::nullopt, std::nullopt}, std::move(info));
        } else {
          Piece& piece = by_rank[rank][record - writer.objects.size()];
          auto& chunks = entries.at(tensors_[piece.tensor].fqn)->chunks;
          storage.emplace_back(
              MetadataIndex{tensors_[piece.tensor].fqn, piece.offsets, static_cast<int64_t>(chunks.size())},
              std::move(info));
          chunks.push_back({std::move(piece.offsets), std::move(piece.sizes)});
        }
        ++record;
      }
    }
  }
  return out;
}

}  // namespace hsdp_ckpt
