#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

#include "hsdp/collectives.h"
#include "hsdp/shard_layout.h"

namespace hsdp_ckpt::hsdp {

/// One parameter of a unit, as it is stored and as it computes.
struct GatheredParam {
  std::vector<int64_t> sizes;
  at::ScalarType stored;  ///< dtype of the shards
  at::ScalarType full;    ///< dtype of the full parameter
};

/// A move of elements within a gather, from an offset of one buffer to an offset of another one.
struct Move {
  int64_t from;  ///< in bytes; kZeros: zeros are written
  int64_t to;    ///< in bytes
  int64_t numel;
  at::ScalarType src, dst;

  static constexpr int64_t kZeros = -1;
};

/// A parameter that is gathered from where it is to where it is used.
struct InPlaceRun {
  int64_t offset;               ///< in the full buffer, in bytes
  std::vector<int64_t> bounds;  ///< of the ranks' pieces, in bytes, see Cut
};

/// How one unit's gather moves bytes between three buffers: the flat one of this rank's shards, the
/// full one that the full parameters point into, and the packed one, which holds everybody's rows
/// of the small parameters, by rank. A plan is made when shards or dtypes change and holds for
/// every gather after that.
///
/// A gather begins with this rank's own rows, cast on the way. Large parameters are gathered in
/// place; small ones, and those that the backend can't take where they are, go through the packed
/// buffer, whatever their dtypes.
struct GatherPlan {
  std::vector<int64_t> full_offsets;  ///< in bytes of the full dtypes, one past the end too
  int64_t packed_stride = 0;          ///< bytes of one rank in the packed buffer
  std::vector<InPlaceRun> in_place;
  std::vector<Move> own_to_full, own_to_packed;  ///< this rank's rows; the same dtypes side by side
  std::vector<Move> unpack;                      ///< packed to full
};

/// `layout`: of the flat buffer, in bytes of the stored dtypes, as this rank's `collectives` cut
/// it.
GatherPlan PlanGather(const std::vector<GatheredParam>& params, const ShardLayout& layout,
                      const Collectives& collectives, c10::DeviceType device);

}  // namespace hsdp_ckpt::hsdp
