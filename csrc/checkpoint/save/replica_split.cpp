#include "checkpoint/save/replica_split.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <utility>

namespace hsdp_ckpt::checkpoint {
namespace {

// Elements that a cut moves in: a row of the first dimension longer than 1, or of a later one where
// rows are large.
int64_t Grain(const format::Shape& sizes, int64_t element) {
  size_t dim = 0;
  while (dim < sizes.size() && sizes[dim] == 1) ++dim;
  while (dim + 1 < sizes.size() && Product(sizes, dim + 1) * element > kCutGrain) ++dim;
  return Product(sizes, dim + 1);
}

// The boxes that make up elements [from, to) of a contiguous box, in order. One where from and to
// are whole rows.
void AddBoxes(size_t tensor, const format::Shape& offsets, const format::Shape& sizes, size_t dim,
              int64_t from, int64_t to, ChunkList& out) {
  const int64_t row = Product(sizes, dim + 1);
  const auto rows = [&](int64_t first, int64_t count) {
    PlannedChunk chunk{tensor, offsets, sizes};
    chunk.offsets[dim] += first;
    chunk.sizes[dim] = count;
    return chunk;
  };
  const auto inside = [&](int64_t first, int64_t begin, int64_t end) {
    const PlannedChunk one = rows(first, 1);
    AddBoxes(tensor, one.offsets, one.sizes, dim + 1, begin, end, out);
  };
  const int64_t first = (from + row - 1) / row, last = to / row;
  if (first > last) return inside(last, from - last * row, to - last * row);
  if (from % row != 0) inside(first - 1, from % row, row);
  if (last > first) {
    const PlannedChunk whole = rows(first, last - first);
    out.Add(tensor, whole.offsets, whole.sizes);
  }
  if (to % row != 0) inside(last, 0, to % row);
}

// Where the cut nearest to byte `exact` of a tensor is: at a multiple of `grain`. Slivers are not
// worth a record, nor a chunk in the metadata, so a cut close to an end of the tensor moves there.
int64_t NearestCut(int64_t exact, int64_t bytes, int64_t grain) {
  int64_t cut = (std::max<int64_t>(exact, 0) + grain / 2) / grain * grain;
  if (cut < kCutMargin && cut < bytes - cut) cut = 0;
  if (bytes - cut < kCutMargin && bytes - cut <= cut) cut = bytes;
  return cut;
}

}  // namespace

int64_t Product(const format::Shape& sizes, size_t from) {
  return std::accumulate(sizes.begin() + static_cast<std::ptrdiff_t>(std::min(from, sizes.size())),
                         sizes.end(), int64_t{1}, std::multiplies<>());
}

// Where the part of the current holder ends in the shard's bytes, if cuts were free.
int64_t ReplicaSplit::EndOfHolder() const {
  const auto holders = static_cast<int64_t>(chunks_.size());
  const auto up_to = static_cast<int64_t>(holder_) + 1;
  if (up_to == holders) return bytes_;
  return bytes_ / holders * up_to + bytes_ % holders * up_to / holders;
}

void ReplicaSplit::AddEmpty(const PlannedChunk& box) {
  chunks_[holder_].Add(box.tensor, box.offsets, box.sizes);
}

void ReplicaSplit::Add(const PlannedChunk& box, int64_t element, Cutting cutting) {
  const int64_t bytes = Product(box.sizes) * element;
  const int64_t grain = cutting == Cutting::kWhole ? bytes : Grain(box.sizes, element) * element;
  int64_t from = 0;
  while (!IsLastHolder() && EndOfHolder() < begin_ + bytes) {
    const int64_t cut = std::clamp(NearestCut(EndOfHolder() - begin_, bytes, grain), from, bytes);
    if (cut == bytes) break;  // all that is left is this holder's, the next one begins behind it
    if (cut > from) AddRange(box, element, from, cut);
    from = cut;
    ++holder_;
  }
  AddRange(box, element, from, bytes);
  begin_ += bytes;
  while (!IsLastHolder() && EndOfHolder() <= begin_) ++holder_;
}

// Gives bytes [from, to) of a box to the current holder.
void ReplicaSplit::AddRange(const PlannedChunk& box, int64_t element, int64_t from, int64_t to) {
  ChunkList& chunks = chunks_[holder_];
  if (from == 0 && to == Product(box.sizes) * element) {
    chunks.Add(box.tensor, box.offsets, box.sizes);
  } else {
    AddBoxes(box.tensor, box.offsets, box.sizes, 0, from / element, to / element, chunks);
  }
}

}  // namespace hsdp_ckpt::checkpoint
