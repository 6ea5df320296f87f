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
class InPlaceRule {
 public:
  InPlaceRule(const Collectives& collectives, c10::DeviceType device)
      : shards_(collectives.shards()),
        exchanges_(shards_ > 1 && collectives.exchanges_gathers(device)),
        coalesces_(shards_ > 1 && collectives.coalesces_gathers(device)),
        is_custom_(collectives.gather_comm().run != nullptr) {}

  // Whether the parameter has a full buffer of its own.
  bool IsLarge(const GatheredParam& param) const {
    const ParamShape shape = ShapeOf(param);
    return base::ChunkRows(shape.rows, shards_) * shape.row_size >= kInPlaceBytes;
  }

  bool GoesInPlace(const GatheredParam& param) const {
    const ParamShape shape = ShapeOf(param);
    if (shape.runs > 1) return false;
    if (shards_ == 1) return true;
    if (exchanges_) return IsLarge(param);
    return coalesces_ && base::CutsEvenly(shape.rows, shards_) &&
           shape.numel() >= kInPlaceOnStreams;
  }

  // A collective takes this rank's piece from anywhere, unless it is a user's: the flat buffer's
  // order is not made for that. Where ranks exchange pieces, and where
  // there is only one, nobody but this rank moves it to its place.
  bool TakesFromFlat(const GatheredParam& param) const {
    return shards_ > 1 && !exchanges_ && !is_custom_ && param.stored == param.full;
  }

  /// In bytes of the full parameter.
  ParamShape ShapeOf(const GatheredParam& param) const {
    return ParamShape::Of(param.cut, shards_, ItemBytes(param));
  }

 private:
  int64_t shards_;
  bool exchanges_, coalesces_, is_custom_;
};

class Planner {
 public:
  Planner(const std::vector<GatheredParam>& params, const ShardLayout& layout,
          const Collectives& collectives, c10::DeviceType device)
      : params_(params),
        layout_(layout),
        shards_(collectives.shards()),
        rank_(collectives.shard_rank()),
        rule_(collectives, device) {}

  GatherPlan Plan() {
    PlaceFull();
    plan_.is_gathered_into.assign(plan_.full_bytes.size(), false);
    std::vector<size_t> packed;
    for (size_t i = 0; i < params_.size(); ++i) {
      if (rule_.GoesInPlace(params_[i])) {
        AddInPlace(i);
      } else {
        packed.push_back(i);
      }
    }
    Pack(packed);
    plan_.packed_dtype = CommonDtype(packed);
    SortByDtypes(plan_.own_rows);
    return std::move(plan_);
  }

 private:
  at::ScalarType CommonDtype(const std::vector<size_t>& packed) const {
    std::optional<at::ScalarType> common;
    for (const size_t i : packed) {
      if (common && *common != params_[i].full) return at::kByte;
      common = params_[i].full;
    }
    return common.value_or(at::kByte);
  }

  int64_t RowBytes(size_t i) const { return rule_.ShapeOf(params_[i]).row_size; }

  void PlaceFull() {
    plan_.full_bytes.assign(1, 0);
    for (const GatheredParam& param : params_) {
      const int64_t bytes = rule_.ShapeOf(param).numel();
      if (rule_.IsLarge(param)) {
        plan_.places.push_back({plan_.full_bytes.size(), 0});
        plan_.full_bytes.push_back(bytes);
      } else {
        int64_t& shared = plan_.full_bytes[0];
        plan_.places.push_back({0, shared});
        shared = RoundUp(shared + bytes, kFullAlignment);
      }
    }
  }

  // This rank's rows of parameter `i`, from the flat buffer to `to` in another one.
  Move OwnRows(size_t i, size_t target, int64_t to) const {
    const int64_t numel = layout_.shard_rows(i, rank_) * RowBytes(i) / ItemBytes(params_[i]);
    return {layout_.offset(i), target, to, numel, params_[i].stored, params_[i].full};
  }

  // Where the rows of `rank` are in the full parameter, in bytes.
  ShardPlace PlaceInFull(size_t i, int64_t rank) const {
    return ShardPlace::Of(rule_.ShapeOf(params_[i]), shards_, rank);
  }

  void AddInPlace(size_t i) {
    InPlaceRun run{plan_.places[i], {}, {}};
    plan_.is_gathered_into[run.place.buffer] = true;
    for (int64_t r = 0; r <= shards_; ++r) {
      run.bounds.push_back(layout_.first_row(i, r) * RowBytes(i));
    }
    if (rule_.TakesFromFlat(params_[i])) {
      run.flat_offset = layout_.offset(i);
    } else {
      const int64_t to = run.place.offset + PlaceInFull(i, rank_).first;
      plan_.own_rows.push_back(OwnRows(i, run.place.buffer, to));
    }
    plan_.in_place.push_back(std::move(run));
  }

  void Pack(const std::vector<size_t>& packed) {
    std::vector<int64_t> offsets;  // within one rank's part of the packed buffer
    bool is_as_flat = !packed.empty();
    for (const size_t i : packed) {
      offsets.push_back(plan_.packed_stride);
      is_as_flat = is_as_flat && rule_.TakesFromFlat(params_[i]);
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
    const Move rows = OwnRows(i, Move::kPacked, begin);
    plan_.own_rows.push_back(rows);
    // Padding is sent along: zeros, so that nothing uninitialised ever leaves the process.
    const int64_t end = begin + rows.numel * ItemBytes(params_[i]);
    const int64_t padded_end =
        begin + RoundUp(layout_.chunk_rows(i) * RowBytes(i), kPackedAlignment);
    if (end == padded_end) return;
    plan_.own_rows.push_back({Move::kZeros, Move::kPacked, end,
                              (padded_end - end) / ItemBytes(params_[i]), rows.src, rows.dst});
  }

  void AddUnpack(size_t i, int64_t offset) {
    for (int64_t r = 0; r < shards_; ++r) {
      const ShardPlace place = PlaceInFull(i, r);
      if (place.run == 0) continue;
      const auto [buffer, begin] = plan_.places[i];
      plan_.unpack.push_back({r * plan_.packed_stride + offset, buffer, begin + place.first,
                              place.run, at::kByte, at::kByte, place.runs, place.stride});
    }
  }

  const std::vector<GatheredParam>& params_;
  const ShardLayout& layout_;
  const int64_t shards_, rank_;
  const InPlaceRule rule_;
  GatherPlan plan_;
};

}  // namespace

std::vector<size_t> FlatOrder(const std::vector<GatheredParam>& params,
                              const Collectives& collectives, c10::DeviceType device) {
  const InPlaceRule rule(collectives, device);
  std::vector<size_t> order(params.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_partition(order.begin(), order.end(),
                        [&](size_t i) { return rule.GoesInPlace(params[i]); });
  return order;
}

GatherPlan PlanGather(const std::vector<GatheredParam>& params, const ShardLayout& layout,
                      const Collectives& collectives, c10::DeviceType device) {
  return Planner(params, layout, collectives, device).Plan();
}

}  // namespace hsdp_ckpt::hsdp
