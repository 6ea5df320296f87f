#include "hsdp/gather_plan.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace hsdp_ckpt::hsdp {
namespace {

constexpr int64_t kPackedAlignment = 16;  // bytes, for vector loads
constexpr int64_t kFullAlignment = 256;   // bytes, for matrix kernels' widest loads

int64_t RoundUp(int64_t bytes, int64_t alignment) {
  return (bytes + alignment - 1) / alignment * alignment;
}

// One fused pass is made for each pair of dtypes.
void SortByDtypes(std::vector<Move>& moves) {
  std::stable_sort(moves.begin(), moves.end(), [](const Move& a, const Move& b) {
    return std::pair(a.src, a.dst) < std::pair(b.src, b.dst);
  });
}

int64_t ItemBytes(const GatheredParam& param) {
  return static_cast<int64_t>(c10::elementSize(param.full));
}

/// Who is gathered in place, and by what.
struct Way {
  Way(const Collectives& collectives, c10::DeviceType device)
      : shards(collectives.shards()),
        exchanges(collectives.exchanges(device)),
        coalesces(collectives.coalesces(device)) {}

  bool GoesInPlace(const GatheredParam& param) const {
    if (shards == 1) return true;
    const auto [rows, row_bytes] = ParamShape::Of(param.sizes, shards, ItemBytes(param));
    if (base::ChunkRows(rows, shards) * row_bytes < kInPlaceBytes) return false;
    return exchanges || (coalesces && base::CutsEvenly(rows, shards));
  }

  // A collective takes this rank's piece from anywhere. Where ranks exchange pieces, and where
  // there is only one, nobody but this rank moves it to its place.
  bool TakesFromFlat(const GatheredParam& param) const {
    return shards > 1 && !exchanges && param.stored == param.full;
  }

  int64_t shards;
  bool exchanges, coalesces;
};

class Planner {
 public:
  Planner(const std::vector<GatheredParam>& params, const ShardLayout& layout,
          const Collectives& collectives, c10::DeviceType device)
      : params_(params),
        layout_(layout),
        rank_(collectives.shard_rank()),
        way_(collectives, device) {}

  GatherPlan Plan() {
    PlaceFull();
    std::vector<size_t> packed;
    for (size_t i = 0; i < params_.size(); ++i) {
      if (way_.GoesInPlace(params_[i])) {
        AddInPlace(i);
      } else {
        packed.push_back(i);
      }
    }
    Pack(packed);
    SortByDtypes(plan_.own_rows);
    return std::move(plan_);
  }

 private:
  int64_t RowBytes(size_t i) const {
    return ParamShape::Of(params_[i].sizes, way_.shards, ItemBytes(params_[i])).row_size;
  }

  void PlaceFull() {
    plan_.full_offsets.assign(1, 0);
    for (size_t i = 0; i < params_.size(); ++i) {
      const int64_t bytes =
          ParamShape::Of(params_[i].sizes, way_.shards, ItemBytes(params_[i])).numel();
      plan_.full_offsets.push_back(RoundUp(plan_.full_offsets[i] + bytes, kFullAlignment));
    }
  }

  // This rank's rows of parameter `i`, from the flat buffer to `to` in another one.
  Move OwnRows(size_t i, int64_t to, Move::Target target) const {
    const int64_t numel = layout_.shard_rows(i, rank_) * RowBytes(i) / ItemBytes(params_[i]);
    return {layout_.offset(i), to, numel, params_[i].stored, params_[i].full, target};
  }

  // Where the rows of `rank` begin in the full buffer.
  int64_t FullOffset(size_t i, int64_t rank) const {
    return plan_.full_offsets[i] + layout_.first_row(i, rank) * RowBytes(i);
  }

  void AddInPlace(size_t i) {
    InPlaceRun run{plan_.full_offsets[i], {}, {}};
    for (int64_t r = 0; r <= way_.shards; ++r) {
      run.bounds.push_back(layout_.first_row(i, r) * RowBytes(i));
    }
    if (way_.TakesFromFlat(params_[i])) {
      run.flat_offset = layout_.offset(i);
    } else {
      plan_.own_rows.push_back(OwnRows(i, FullOffset(i, rank_), Move::Target::kFull));
    }
    plan_.in_place.push_back(std::move(run));
  }

  void Pack(const std::vector<size_t>& packed) {
    std::vector<int64_t> offsets;  // within one rank's part of the packed buffer
    bool is_as_flat = !packed.empty();
    for (const size_t i : packed) {
      offsets.push_back(plan_.packed_stride);
      is_as_flat = is_as_flat && way_.TakesFromFlat(params_[i]);
      plan_.packed_stride += RoundUp(layout_.chunk_rows(i) * RowBytes(i), kPackedAlignment);
    }
    if (is_as_flat) plan_.packed_flat_offset = layout_.offset(packed.front());
    for (size_t p = 0; p < packed.size(); ++p) {
      TORCH_INTERNAL_ASSERT(!is_as_flat ||
                            layout_.offset(packed[p]) - offsets[p] == *plan_.packed_flat_offset);
      if (!is_as_flat) AddPacked(packed[p], offsets[p]);
      AddUnpack(packed[p], offsets[p]);
    }
  }

  void AddPacked(size_t i, int64_t offset) {
    const int64_t begin = rank_ * plan_.packed_stride + offset;
    const Move rows = OwnRows(i, begin, Move::Target::kPacked);
    plan_.own_rows.push_back(rows);
    // Padding is sent along: zeros, so that nothing uninitialised ever leaves the process.
    const int64_t end = begin + rows.numel * ItemBytes(params_[i]);
    const int64_t padded_end =
        begin + RoundUp(layout_.chunk_rows(i) * RowBytes(i), kPackedAlignment);
    if (end == padded_end) return;
    plan_.own_rows.push_back({Move::kZeros, end, (padded_end - end) / ItemBytes(params_[i]),
                              rows.src, rows.dst, rows.target});
  }

  void AddUnpack(size_t i, int64_t offset) {
    for (int64_t r = 0; r < way_.shards; ++r) {
      const int64_t bytes = layout_.shard_rows(i, r) * RowBytes(i);
      const int64_t from = r * plan_.packed_stride + offset;
      if (bytes > 0) {
        plan_.unpack.push_back({from, FullOffset(i, r), bytes, at::kByte, at::kByte});
      }
    }
  }

  const std::vector<GatheredParam>& params_;
  const ShardLayout& layout_;
  const int64_t rank_;
  const Way way_;
  GatherPlan plan_;
};

}  // namespace

std::vector<size_t> FlatOrder(const std::vector<GatheredParam>& params,
                              const Collectives& collectives, c10::DeviceType device) {
  const Way way(collectives, device);
  std::vector<size_t> order(params.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_partition(order.begin(), order.end(),
                        [&](size_t i) { return way.GoesInPlace(params[i]); });
  return order;
}

GatherPlan PlanGather(const std::vector<GatheredParam>& params, const ShardLayout& layout,
                      const Collectives& collectives, c10::DeviceType device) {
  return Planner(params, layout, collectives, device).Plan();
}

}  // namespace hsdp_ckpt::hsdp
