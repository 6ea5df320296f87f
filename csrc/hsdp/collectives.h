#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace hsdp_ckpt {

using WorkPtr = c10::intrusive_ptr<c10d::Work>;

/// The three collectives of a sharded step, over process groups that are looked up by name at every call.
///
/// Ownership: none. A group held here would outlive `destroy_process_group`; after that a call throws, naming the group.
/// Gathers and reductions have groups of their own: a rank that lacks a unit's gradient reduces that unit later than its
/// peers do, and within one group its gathers would then meet their reductions.
/// A group of one rank needs no collective; callers check the sizes.
/// Thread safety: as the process groups', one caller at a time.
class Collectives {
 public:
  /// Names as `ProcessGroup.group_name` has them. `replica_group` is absent on a 1-D mesh.
  Collectives(std::string shard_group, std::optional<std::string> replica_group);

  /// Groups of the same ranks for the reductions alone. Until this is called the reductions use the groups given above.
  void SetReduceGroups(std::string shard_group, std::optional<std::string> replica_group);

  int64_t shards() const { return shards_; }
  int64_t shard_rank() const { return shard_rank_; }
  int64_t replicas() const { return replicas_; }

  /// All calls return the pending work, or null where the backend has none: then the operation is ordered on the current
  /// stream, and the caller keeps the tensors alive until that stream has passed it.
  /// `output` holds shards() times `input`'s elements; both are contiguous and of one dtype.
  WorkPtr AllGather(at::Tensor output, at::Tensor input) const;
  /// `input` holds shards() times `output`'s elements. Averages if `Averages(output)`, else sums.
  WorkPtr ReduceScatter(at::Tensor output, at::Tensor input) const;
  /// In place over the replicas. Averages if `Averages(tensor)`, else sums.
  WorkPtr AllReduce(at::Tensor tensor) const;

  /// Whether the backend divides on the way (NCCL, float32 and bfloat16: no pass of its own). If not, the caller scales.
  bool Averages(c10::DeviceType device, at::ScalarType dtype) const;
  /// What the reduced sums still lack to be averages over shards and replicas.
  double PostScale(c10::DeviceType device, at::ScalarType dtype) const;
  /// What gradients are multiplied with before the reduction: below one for float16 only, whose sums may overflow
  /// (a power of two near the square root of the number of ranks, as torch's FSDP2 divides).
  double PreScale(at::ScalarType dtype) const;

 private:
  std::string gather_group_, reduce_group_;
  std::optional<std::string> replica_group_;
  int64_t shards_ = 1, shard_rank_ = 0, replicas_ = 1;
};

}  // namespace hsdp_ckpt
