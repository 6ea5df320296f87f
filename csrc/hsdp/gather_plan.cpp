#include "hsdp/gather_plan.h"

#include <algorithm>
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

class Planner {
 public:
  Planner(const std::vector<GatheredParam>& params, const ShardLayout& layout,
          const Collectives& collectives, c10::DeviceType device)
      : params_(params),
        layout_(layout),
        shards_(collectives.shards()),
        rank_(collectives.shard_rank()),
        collectives_(collectives),
        device_(device),
        exchanges_(collectives.exchanges(device)) {}

  GatherPlan Plan() {
    PlaceFull();
    std::vector<size_t> packed;
    for (size_t i = 0; i < params_.size(); ++i) {
      if (GoesInPlace(i)) {
        AddInPlace(i);
      } else {
        packed.push_back(i);
        packed_offsets_.push_back(plan_.packed_stride);
        plan_.packed_stride += RoundUp(layout_.chunk_rows(i) * RowBytes(i), kPackedAlignment);
      }
    }
    for (size_t p = 0; p < packed.size(); ++p) AddPacked(packed[p], packed_offsets_[p]);
    for (size_t p = 0; p < packed.size(); ++p) AddUnpack(packed[p], packed_offsets_[p]);
    SortByDtypes(plan_.own_to_full);
    SortByDtypes(plan_.own_to_packed);
    return std::move(plan_);
  }

 private:
  int64_t ItemBytes(size_t i) const {
    return static_cast<int64_t>(c10::elementSize(params_[i].full));
  }
  int64_t RowBytes(size_t i) const {
    return ParamShape::Of(params_[i].sizes, shards_, ItemBytes(i)).row_size;
  }
  int64_t FullBytes(size_t i) const {
    return ParamShape::Of(params_[i].sizes, shards_, ItemBytes(i)).numel();
  }

  void PlaceFull() {
    plan_.full_offsets.assign(1, 0);
    for (size_t i = 0; i < params_.size(); ++i) {
      const int64_t end = plan_.full_offsets[i] + FullBytes(i);
      plan_.full_offsets.push_back(RoundUp(end, kFullAlignment));
    }
  }

  bool GoesInPlace(size_t i) const {
    if (shards_ == 1) return true;
    if (layout_.chunk_rows(i) * RowBytes(i) < kInPlaceBytes) return false;
    return exchanges_ || (collectives_.coalesces(device_) && layout_.even(i));
  }

  // This rank's rows of parameter `i`, from the flat buffer to `to` in another one.
  Move OwnRows(size_t i, int64_t to) const {
    const int64_t numel = layout_.shard_rows(i, rank_) * RowBytes(i) / ItemBytes(i);
    return {layout_.offset(i), to, numel, params_[i].stored, params_[i].full};
  }

  // Where the rows of `rank` begin in the full buffer.
  int64_t FullOffset(size_t i, int64_t rank) const {
    return plan_.full_offsets[i] + layout_.first_row(i, rank) * RowBytes(i);
  }

  void AddInPlace(size_t i) {
    plan_.own_to_full.push_back(OwnRows(i, FullOffset(i, rank_)));
    InPlaceRun run{plan_.full_offsets[i], {}};
    for (int64_t r = 0; r <= shards_; ++r) {
      run.bounds.push_back(layout_.first_row(i, r) * RowBytes(i));
    }
    plan_.in_place.push_back(std::move(run));
  }

  void AddPacked(size_t i, int64_t offset) {
    const int64_t begin = rank_ * plan_.packed_stride + offset;
    plan_.own_to_packed.push_back(OwnRows(i, begin));
    // Padding is sent along: zeros, so that nothing uninitialised ever leaves the process.
    const int64_t end = begin + layout_.shard_rows(i, rank_) * RowBytes(i);
    const int64_t padded_end =
        begin + RoundUp(layout_.chunk_rows(i) * RowBytes(i), kPackedAlignment);
    if (end == padded_end) return;
    plan_.own_to_packed.push_back({Move::kZeros, end, padded_end - end, at::kByte, at::kByte});
  }

  void AddUnpack(size_t i, int64_t offset) {
    for (int64_t r = 0; r < shards_; ++r) {
      const int64_t bytes = layout_.shard_rows(i, r) * RowBytes(i);
      const int64_t from = r * plan_.packed_stride + offset;
      if (bytes > 0) {
        plan_.unpack.push_back({from, FullOffset(i, r), bytes, at::kByte, at::kByte});
      }
    }
  }

  const std::vector<GatheredParam>& params_;
  const ShardLayout& layout_;
  const int64_t shards_, rank_;
  const Collectives& collectives_;
  const c10::DeviceType device_;
  const bool exchanges_;
  std::vector<int64_t> packed_offsets_;  // within one rank's part of the packed buffer
  GatherPlan plan_;
};

}  // namespace

GatherPlan PlanGather(const std::vector<GatheredParam>& params, const ShardLayout& layout,
                      const Collectives& collectives, c10::DeviceType device) {
  return Planner(params, layout, collectives, device).Plan();
}

}  // namespace hsdp_ckpt::hsdp
