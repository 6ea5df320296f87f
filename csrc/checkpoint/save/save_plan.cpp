#include "checkpoint/save/save_plan.h"

#include <algorithm>
#include <charconv>
#include <deque>
#include <functional>
#include <iterator>
#include <map>
#include <numeric>
#include <span>

#include "base/error.h"
#include "base/shard_rows.h"
#include "format/encoder.h"
#include "format/file_index.h"
#include "format/record.h"
#include "format/tensor_pickle.h"

namespace hsdp_ckpt::checkpoint {
namespace {

int64_t Product(const format::Shape& sizes, size_t from = 0) {
  return std::accumulate(sizes.begin() + static_cast<std::ptrdiff_t>(std::min(from, sizes.size())),
                         sizes.end(), int64_t{1}, std::multiplies<>());
}

// Calls with each coordinate of the sharding dimensions; those of replicating dimensions stay 0.
void ForEachShard(const Sharding& sharding,
                  const std::function<void(const std::vector<int64_t>&)>& call) {
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

// Elements that a cut moves in: a row of the first dimension longer than 1, or of a later one where
// rows are large.
int64_t Grain(const format::Shape& sizes, int64_t element) {
  size_t dim = 0;
  while (dim < sizes.size() && sizes[dim] == 1) ++dim;
  while (dim + 1 < sizes.size() && Product(sizes, dim + 1) * element > SavePlan::kCutGrain) ++dim;
  return Product(sizes, dim + 1);
}

// The boxes that make up elements [from, to) of a contiguous box, in order. One where from and to
// are whole rows.
void AddBoxes(size_t tensor, const format::Shape& offsets, const format::Shape& sizes, size_t dim,
              int64_t from, int64_t to, PieceList& out) {
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
  if (last > first) {
    const Piece whole = rows(first, last - first);
    out.Add(tensor, whole.offsets, whole.sizes);
  }
  if (to % row != 0) inside(last, 0, to % row);
}

}  // namespace

void PieceList::Add(size_t tensor, const format::Shape& offsets, const format::Shape& sizes) {
  heads_.push_back(
      {static_cast<uint32_t>(tensor), static_cast<uint32_t>(sizes.size()), numbers_.size()});
  numbers_.insert(numbers_.end(), offsets.begin(), offsets.end());
  numbers_.insert(numbers_.end(), sizes.begin(), sizes.end());
}

void PieceList::Append(const PieceList& other) {
  const size_t begin = numbers_.size();
  numbers_.insert(numbers_.end(), other.numbers_.begin(), other.numbers_.end());
  for (Head head : other.heads_) {
    head.first += begin;
    heads_.push_back(head);
  }
}

Piece PieceList::operator[](size_t i) const {
  const Head& head = heads_[i];
  const auto first = numbers_.begin() + static_cast<std::ptrdiff_t>(head.first);
  const auto middle = first + head.dimensions;
  return {head.tensor, format::Shape(first, middle),
          format::Shape(middle, middle + head.dimensions)};
}

SavePlan::SavePlan(std::vector<Sharding> shardings, std::vector<PlannedTensor> tensors)
    : shardings_(std::move(shardings)),
      tensors_(std::move(tensors)),
      of_sharding_(shardings_.size()) {
  for (size_t i = 0; i < tensors_.size(); ++i) of_sharding_.at(tensors_[i].sharding).push_back(i);
  for (size_t i = 0; i < shardings_.size(); ++i) {
    if (of_sharding_[i].empty()) continue;
    const Sharding& sharding = shardings_[i];
    if (sharding.shard_dims.size() != sharding.mesh_shape.size() ||
        Product(sharding.mesh_shape) != static_cast<int64_t>(sharding.ranks.size())) {
      throw base::Error("a mesh whose shape, ranks and placements do not fit together");
    }
    ForEachShard(sharding, [&](const Coordinates& at) {
      if (!Holders(sharding, at).empty()) return;
      for (const size_t index : of_sharding_[i]) {
        Piece box{index, {}, {}};
        Box(tensors_[index], at, &box.offsets, &box.sizes);
        if (Product(box.sizes) == 0) continue;
        std::string where;
        for (const int64_t offset : box.offsets)
          where += (where.empty() ? "" : ", ") + std::to_string(offset);
        throw base::Error(
            tensors_[index].fqn + ": no rank of the saving process group holds its shard at [" +
            where +
            "]; save through a group that has every shard, such as one shard group or all ranks");
      }
    });
  }
}

// Left to right over the mesh's dimensions, each cut by RowsOfShard's rule.
void SavePlan::Box(const PlannedTensor& tensor, const Coordinates& at, format::Shape* offsets,
                   format::Shape* sizes) const {
  const Sharding& sharding = shardings_[tensor.sharding];
  offsets->assign(tensor.size->size(), 0);
  *sizes = *tensor.size;
  for (size_t i = 0; i < at.size(); ++i) {
    if (sharding.shard_dims[i] < 0) continue;
    const auto dim = static_cast<size_t>(sharding.shard_dims[i]);
    if (dim >= sizes->size())
      throw base::Error(tensor.fqn + ": sharded along a dimension that it has not");
    int64_t& size = (*sizes)[dim];
    const base::ShardRows rows = base::RowsOfShard(size, sharding.mesh_shape[i], at[i]);
    (*offsets)[dim] += rows.first;
    size = rows.count;
  }
}

// The ranks of the saving group with these shard coordinates, in mesh order.
std::vector<int64_t> SavePlan::Holders(const Sharding& sharding, const Coordinates& at) const {
  std::vector<int64_t> holders;
  Coordinates each = at;
  for (;;) {
    int64_t flat = 0;
    for (size_t i = 0; i < each.size(); ++i) flat = flat * sharding.mesh_shape[i] + each[i];
    if (const int64_t rank = sharding.ranks[static_cast<size_t>(flat)]; rank >= 0)
      holders.push_back(rank);
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
std::vector<PieceList> SavePlan::Split(size_t sharding, const Coordinates& at,
                                       size_t holders) const {
  const std::vector<size_t>& tensors = of_sharding_[sharding];
  const bool first_shard = std::all_of(at.begin(), at.end(), [](int64_t c) { return c == 0; });
  format::Shape offsets, sizes;  // of the tensor at hand
  int64_t total = 0;
  for (const size_t index : tensors) {
    Box(tensors_[index], at, &offsets, &sizes);
    total += format::TensorBytes(*tensors_[index].dtype, sizes);
  }
  std::vector<PieceList> out(holders);
  const auto parts = static_cast<int64_t>(holders);
  size_t holder = 0;
  const auto bound = [&](size_t after) {  // where the part of holder `after` ends
    const auto r = static_cast<int64_t>(after) + 1;
    return r == parts ? total : total / parts * r + total % parts * r / parts;
  };
  int64_t begin = 0;  // of the tensor at hand, in the shard's bytes end to end
  for (const size_t index : tensors) {
    Box(tensors_[index], at, &offsets, &sizes);
    const int64_t element = tensors_[index].dtype->size;
    const int64_t bytes = format::TensorBytes(*tensors_[index].dtype, sizes);
    if (bytes == 0) {
      // Other shards' empty parts say nothing; a tensor without elements has one chunk, so that it
      // is in the checkpoint.
      if (first_shard && Product(*tensors_[index].size) == 0)
        out[holder].Add(index, offsets, sizes);
      continue;
    }
    const int64_t grain = shardings_[sharding].whole ? bytes : Grain(sizes, element) * element;
    int64_t from = 0;
    while (holder + 1 < holders && bound(holder) < begin + bytes) {
      int64_t cut = std::max<int64_t>(bound(holder) - begin, 0);
      cut = (cut + grain / 2) / grain * grain;
      // Slivers are not worth a record, nor a chunk in the metadata.
      if (cut < kCutMargin && cut < bytes - cut) cut = 0;
      if (bytes - cut < kCutMargin && bytes - cut <= cut) cut = bytes;
      cut = std::clamp(cut, from, bytes);
      if (cut == bytes) break;  // the whole rest is this holder's, the next one begins behind it
      if (cut > from)
        AddBoxes(index, offsets, sizes, 0, from / element, cut / element, out[holder]);
      from = cut;
      ++holder;
    }
    if (from == 0) {
      out[holder].Add(index, offsets, sizes);
    } else {
      AddBoxes(index, offsets, sizes, 0, from / element, bytes / element, out[holder]);
    }
    begin += bytes;
    while (holder + 1 < holders && bound(holder) <= begin) ++holder;
  }
  return out;
}

std::optional<SavePlan::Coordinates> SavePlan::CoordinatesOf(const Sharding& sharding,
                                                             int64_t rank) {
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

PieceList SavePlan::PiecesOf(int64_t rank) const {
  PieceList pieces;
  for (size_t i = 0; i < shardings_.size(); ++i) {
    const auto at = of_sharding_[i].empty() ? std::nullopt : CoordinatesOf(shardings_[i], rank);
    if (!at) continue;
    const auto holders = Holders(shardings_[i], *at);
    const auto place =
        static_cast<size_t>(std::find(holders.begin(), holders.end(), rank) - holders.begin());
    pieces.Append(Split(i, *at, holders.size())[place]);
  }
  return pieces;
}

PieceList SavePlan::LocalShards(int64_t rank) const {
  PieceList shards;
  format::Shape offsets, sizes;
  for (size_t i = 0; i < shardings_.size(); ++i) {
    const auto at = CoordinatesOf(shardings_[i], rank);
    if (!at) continue;
    for (const size_t index : of_sharding_[i]) {
      Box(tensors_[index], *at, &offsets, &sizes);
      shards.Add(index, offsets, sizes);
    }
  }
  return shards;
}

format::Shape SavePlan::ShardOffsets(int64_t rank, size_t tensor) const {
  const PlannedTensor& planned = tensors_.at(tensor);
  const auto at = CoordinatesOf(shardings_[planned.sharding], rank);
  if (!at) throw base::Error(planned.fqn + ": rank " + std::to_string(rank) + " has no shard");
  format::Shape offsets, sizes;
  Box(planned, *at, &offsets, &sizes);
  return offsets;
}

namespace {

// Sizes of framing by dtype and shape, which repeat from shard to shard: making a frame costs
// microseconds.
class RecordSizes {
 public:
  const format::RecordSize& Of(const format::DType& dtype, const format::Shape& sizes) {
    const auto found = known_.find({dtype.code, sizes});
    if (found != known_.end()) return found->second;
    return known_.emplace(std::pair(dtype.code, sizes), format::SizeOfRecord(dtype, sizes))
        .first->second;
  }

 private:
  std::map<std::pair<uint8_t, format::Shape>, format::RecordSize> known_;
};

// A rank's files, record by record.
class FileLayout {
 public:
  FileLayout(const std::vector<PlannedTensor>& tensors, bool single_file, RecordSizes& sizes)
      : tensors_(tensors), single_file_(single_file), sizes_(sizes) {}

  PlannedRecord AddObject(int64_t size) {
    Next();
    return Add(position_, size, 0, size, 0);
  }
  PlannedRecord AddPiece(const Piece& piece) {
    Next();
    const format::RecordSize& size = sizes_.Of(*tensors_[piece.tensor].dtype, piece.sizes);
    return Add(format::RecordStart(position_, size), size.total(), size.head, size.payload,
               piece.sizes.size());
  }
  size_t files() const { return files_; }  // so far; the last one holds what was added last
  // Of the last file, if nothing more comes into it.
  int64_t size() const { return format::IndexStart(position_) + index_ + format::kIndexTail; }

 private:
  PlannedRecord Add(int64_t offset, int64_t length, int64_t head, int64_t payload,
                    size_t dimensions) {
    position_ = offset + length;
    index_ += format::IndexEntrySize(payload, dimensions);
    return {offset, length, offset + head};
  }
  void Next() {
    if (files_ > 0 && single_file_) return;
    ++files_;
    position_ = index_ = 0;
  }

  const std::vector<PlannedTensor>& tensors_;
  const bool single_file_;
  RecordSizes& sizes_;
  size_t files_ = 0;
  int64_t position_ = 0,
          index_ = 0;  // where the next record may begin, and how long the index is by now
};

}  // namespace

std::vector<PlannedFile> SavePlan::Layout(const PieceList& pieces,
                                          const std::vector<int64_t>& objects,
                                          bool single_file) const {
  RecordSizes sizes;
  FileLayout layout(tensors_, single_file, sizes);
  std::vector<PlannedFile> files;
  const auto take = [&](const PlannedRecord& record) {
    files.resize(layout.files());
    if (files.back().records.empty() && single_file)
      files.back().records.reserve(objects.size() + pieces.size());
    files.back().records.push_back(record);
    files.back().size = layout.size();
  };
  for (const int64_t size : objects) take(layout.AddObject(size));
  for (const Piece& piece : pieces) take(layout.AddPiece(piece));
  return files;
}

std::vector<PieceList> SavePlan::PiecesByRank(size_t ranks) const {
  std::vector<PieceList> by_rank(ranks);
  for (size_t i = 0; i < shardings_.size(); ++i) {
    if (of_sharding_[i].empty()) continue;
    ForEachShard(shardings_[i], [&](const Coordinates& at) {
      const auto holders = Holders(shardings_[i], at);
      if (holders.empty()) return;  // the constructor has seen that there is nothing to write
      const auto parts = Split(i, at, holders.size());
      for (size_t r = 0; r < holders.size(); ++r)
        by_rank.at(static_cast<size_t>(holders[r])).Append(parts[r]);
    });
  }
  return by_rank;
}

namespace {

void EncodePath(format::MetadataEncoder& encoder, std::string_view name,
                std::span<const PlannedPaths::Part> parts) {
  std::vector<format::PathPart> path;
  size_t at = 0;
  for (const PlannedPaths::Part& part : parts) {
    const std::string_view text = name.substr(at, part.bytes);
    at += part.bytes + 1;
    int64_t number = 0;
    if (!part.is_index) {
      path.emplace_back(text);
    } else if (std::from_chars(text.data(), text.data() + text.size(), number).ec == std::errc()) {
      path.emplace_back(number);
    } else {
      throw base::Error(std::string(name) + ": no index of a list at '" + std::string(text) + "'");
    }
  }
  encoder.Path(name, path);
}

}  // namespace

SavePlan::Encoded SavePlan::Encode(const std::vector<Writer>& writers, uint64_t save_id,
                                   bool single_file, const PlannedPaths* paths,
                                   const std::optional<format::StorageMeta>& meta,
                                   const std::optional<std::string>& version) const {
  const std::vector<PieceList> by_rank = PiecesByRank(writers.size());
  // Each tensor's chunks, by rank and place among the rank's pieces: those of tensor i end where
  // those of i + 1 begin.
  std::vector<size_t> first(tensors_.size() + 1);
  for (const PieceList& pieces : by_rank) {
    for (size_t i = 0; i < pieces.size(); ++i) ++first[pieces.tensor(i) + 1];
  }
  std::partial_sum(first.begin(), first.end(), first.begin());
  std::vector<std::pair<uint32_t, uint32_t>> chunks(first.back());
  std::vector<uint32_t> count(tensors_.size());
  for (size_t rank = 0; rank < by_rank.size(); ++rank) {
    for (size_t i = 0; i < by_rank[rank].size(); ++i) {
      const size_t tensor = by_rank[rank].tensor(i);
      chunks[first[tensor] + count[tensor]++] = {static_cast<uint32_t>(rank),
                                                 static_cast<uint32_t>(i)};
    }
  }

  size_t expected = 4096;
  for (const PlannedTensor& planned : tensors_) expected += 128 + 2 * planned.fqn.size();
  format::MetadataEncoder encoder(expected + 128 * chunks.size());
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const PlannedTensor& planned = tensors_[i];
    const auto dtype = format::DtypeFromName(planned.dtype->name);
    if (!dtype)
      throw base::Error(planned.fqn + ": metadata has no dtype " +
                        std::string(planned.dtype->name));
    format::TensorMetadata entry;
    entry.properties.dtype = *dtype;
    entry.properties.pin_memory = planned.pinned;
    if (planned.strides) entry.properties.strides = *planned.strides;
    entry.size = *planned.size;
    for (size_t at = first[i]; at < first[i + 1]; ++at) {
      Piece piece = by_rank[chunks[at].first][chunks[at].second];
      entry.chunks.push_back({std::move(piece.offsets), std::move(piece.sizes)});
    }
    encoder.Entry(planned.fqn, entry);
  }
  for (const Writer& writer : writers) {
    for (const auto& object : writer.objects) encoder.Entry(object.first, format::BytesMetadata{});
  }
  if (paths == nullptr) {
    encoder.PlannerData({});
  } else {
    encoder.BeginPaths();
    size_t begin = 0, number = 0;
    const auto path = [&](const std::string& name) {
      const size_t parts = paths->counts.at(number++);
      EncodePath(encoder, name, std::span(paths->parts).subspan(begin, parts));
      begin += parts;
    };
    for (const PlannedTensor& planned : tensors_) path(planned.fqn);
    for (const Writer& writer : writers) {
      for (const auto& object : writer.objects) path(object.first);
    }
  }

  encoder.BeginRecords();
  std::deque<std::pair<std::string, int64_t>> files;  // the encoder has views of the names
  RecordSizes sizes;
  std::fill(count.begin(), count.end(), 0);
  for (size_t rank = 0; rank < writers.size(); ++rank) {
    const Writer& writer = writers[rank];
    FileLayout layout(tensors_, single_file, sizes);
    int64_t number = 0;
    const auto record = [&](const PlannedRecord& place, const std::string& fqn,
                            const std::optional<format::Shape>& offset,
                            std::optional<int64_t> hint) {
      if (static_cast<size_t>(number) < layout.files()) {
        const format::DataFileName name{static_cast<int64_t>(rank), save_id, writer.owner, false,
                                        number++};
        files.emplace_back(name.ToString(), 0);
      }
      files.back().second = layout.size();
      encoder.Record(fqn, offset, hint, files.back().first, place.offset, place.length);
    };
    for (const auto& [fqn, size] : writer.objects)
      record(layout.AddObject(size), fqn, std::nullopt, std::nullopt);
    for (const Piece& piece : by_rank[rank]) {
      record(layout.AddPiece(piece), tensors_[piece.tensor].fqn, piece.offsets,
             count[piece.tensor]++);
    }
  }
  return {encoder.Finish(meta, version),
          {std::make_move_iterator(files.begin()), std::make_move_iterator(files.end())}};
}

}  // namespace hsdp_ckpt::checkpoint
