#pragma once

#include <ATen/ATen.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "hsdp/collectives.h"
#include "hsdp/shard_layout.h"

namespace hsdp_ckpt::hsdp {

/// One parameter of a unit, as it is stored and as it computes.
struct GatheredParam {
  CutSizes cut;
  at::ScalarType stored;  ///< dtype of the shards
  at::ScalarType full;    ///< dtype of the full parameter
};

/// A move of elements within a gather, from an offset of one buffer to an offset of another one.
struct Move {
  int64_t from;   ///< in bytes; kZeros: zeros are written
  size_t target;  ///< index of a full buffer, or kPacked
  int64_t to;     ///< in bytes
  int64_t numel;
  at::ScalarType src, dst;
  int64_t runs = 1;    ///< so often `numel` elements, which follow each other in the source
  int64_t stride = 0;  ///< elements from one run to the next in the target

  static constexpr int64_t kZeros = -1;
  static constexpr size_t kPacked = SIZE_MAX;
};

/// Where a full parameter is.
struct FullPlace {
  size_t buffer;   ///< index of a full buffer
  int64_t offset;  ///< in bytes
};

/// A parameter that is gathered from where it is to where it is used.
struct InPlaceRun {
  FullPlace place;
  std::vector<int64_t> bounds;  ///< of the ranks' pieces, in bytes, see Cut
  /// Where this rank's piece is in the flat buffer, in bytes; absent where the plan's moves have
  /// put it into the full one.
  std::optional<int64_t> flat_offset;
};

/// How one unit's gather moves bytes between the flat buffer of this rank's shards, the full ones
/// that the full parameters point into, and the packed one, which holds everybody's rows of some
/// parameters, by rank. A plan is made when shards or dtypes change and holds for every gather
/// after that.
///
/// A large parameter has a full buffer of its own, so that it can be freed alone, and small ones
/// share one. What the backend can take where it is is gathered in place; other parameters go
/// through the packed buffer, whatever their dtypes. This rank's own rows are sent from the flat
/// buffer where a collective takes them from there as they are; if not, a gather begins with moving
/// them, cast on the way.
struct GatherPlan {
  std::vector<FullPlace> places;              ///< by parameter
  std::vector<int64_t> full_bytes;            ///< by full buffer; the first one is the shared one
  std::vector<bool> is_gathered_into;         ///< by full buffer; others are for unpacking alone
  int64_t packed_stride = 0;                  ///< bytes of one rank in the packed buffer
  at::ScalarType packed_dtype = at::kByte;    ///< of all packed parameters, if they have one
  std::optional<int64_t> packed_flat_offset;  ///< see InPlaceRun::flat_offset
  std::vector<InPlaceRun> in_place;
  std::vector<Move> own_rows;  ///< flat to full or packed; the same dtypes side by side
  std::vector<Move> unpack;    ///< packed to full
};

/// The parameters' indices as they should lie in the flat buffer: first those that are gathered in
/// place, then the packed ones, so that these can be sent as one.
std::vector<size_t> FlatOrder(const std::vector<GatheredParam>& params,
                              const Collectives& collectives, c10::DeviceType device);

/// `layout`: of the flat buffer, in bytes of the stored dtypes and in FlatOrder, as this rank's
/// `collectives` cut it.
GatherPlan PlanGather(const std::vector<GatheredParam>& params, const ShardLayout& layout,
                      const Collectives& collectives, c10::DeviceType device);

}  // namespace hsdp_ckpt::hsdp
