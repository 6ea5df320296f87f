#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>
#include <vector>

#include "hsdp/departures.h"
#include "hsdp/pending_works.h"

namespace hsdp_ckpt::hsdp {

/// Where ranks exchange pieces, so many bytes of one rank travel alone, from where they are to
/// where they belong. Fewer are packed with others: a message of their own costs more than the
/// copies. Between Gloo ranks the two take the same time at 128 KiB a piece
/// (test/bench/results/step.md); half of that, since what is packed takes memory and copies
/// besides.
inline constexpr int64_t kInPlaceBytes = 64 << 10;

/// Where collectives are called, so many bytes of a whole parameter travel alone. Coalesced or not,
/// each is an operation and two events more for the host to queue, some microseconds; a device
/// copies this much in as many.
inline constexpr int64_t kInPlaceOnStreams = 8 << 20;

/// One contiguous run of elements cut among the ranks of the shard group: rank r's piece is
/// [bounds[r], bounds[r + 1]).
struct Cut {
  at::Tensor run;  ///< one dimension
  std::vector<int64_t> bounds;

  at::Tensor piece(int64_t rank) const {
    const auto r = static_cast<size_t>(rank);
    return run.narrow(0, bounds[r], bounds[r + 1] - bounds[r]);
  }
};

/// A user's all-gather or reduce-scatter among the shards, and memory for what it moves: torch's
/// `Comm` (torch/distributed/fsdp/_fully_shard/_fsdp_api.py). Either may be absent.
struct CustomComm {
  using Allocate =
      std::function<at::Tensor(int64_t numel, at::ScalarType dtype, at::Device device)>;
  /// Over for the current stream, and on the CPU for the host, when this returns. `average`: the
  /// sum is to be divided by the number of shards.
  using Run = std::function<void(const at::Tensor& output, const at::Tensor& input, bool average)>;

  Allocate allocate;
  Run run;

  at::Tensor Empty(int64_t numel, const at::TensorOptions& options) const {
    if (!allocate) return at::empty({numel}, options);
    return allocate(numel, c10::typeMetaToScalarType(options.dtype()), options.device());
  }
};

/// The communication of a sharded step, over process groups that are looked up by name at every
/// call.
///
/// There are two traits, and the backend decides which is better:
///  - `exchanges`: ranks send point to point, every piece straight from where it is to where it
///    belongs, pieces of any size. Gloo does so on the CPU: its all-gather copies, and its
///    reduce-scatter is an all-reduce inside.
///  - Otherwise ranks call collectives, coalesced where the backend launches several as one (NCCL).
///
/// On a device streams order them: one that is called here is behind the current stream's work, and
/// what that stream is given afterwards is behind it. Which backends return a work for it says
/// nothing (of torch 2.15's two for NCCL one does), and when it is over is never asked.
///
/// Gathers and reductions have groups of their own: a rank that lacks a unit's gradient reduces
/// that unit later than its peers do, and within one group its gathers would then meet their
/// reductions. A group of one rank needs no communication; callers check the sizes.
///
/// Where `host_orders`, a call returns pending works; the tensors must live until they are over.
/// Elsewhere nothing is pending, and the tensors must live until the current stream has passed the
/// operation. Its work, if there is one (PendingWorks::TakeQueued), should be waited for by some
/// stream: it may keep the tensors until then.
///
/// Ownership: none. A group held here would outlive `destroy_process_group`; after that a call
/// throws, naming the group. Thread safety: as the process groups', one caller at a time for each
/// group.
class Collectives {
 public:
  /// The names are those of `ProcessGroup.group_name`. `replica_group` is absent on a 1-D mesh.
  /// `rank` is that in the job, for messages.
  Collectives(std::string shard_group, std::optional<std::string> replica_group, int64_t rank);

  /// Gives the reductions groups of their own, of the same ranks. Until this is called they use the
  /// groups given above.
  void SetReduceGroups(std::string shard_group, std::optional<std::string> replica_group);
  /// Those of the root. They number what is sent point to point: the ranks agree on an order of
  /// messages within each root, not between them. Until this is called there are no peers.
  void SetDepartures(std::shared_ptr<Departures> departures) {
    departures_ = std::move(departures);
  }

  /// What sends gathers and reduce-scatters instead, and their packed buffers' memory. Plans and
  /// buckets that were made before do not follow.
  void SetGatherComm(CustomComm comm) { gather_comm_ = std::move(comm); }
  void SetReduceComm(CustomComm comm) { reduce_comm_ = std::move(comm); }
  const CustomComm& gather_comm() const { return gather_comm_; }
  const CustomComm& reduce_comm() const { return reduce_comm_; }

  int64_t rank() const { return rank_; }
  int64_t shards() const { return shards_; }
  int64_t shard_rank() const { return shard_rank_; }
  int64_t replicas() const { return replicas_; }

  /// Whether operations on tensors of `device` are over only when the host has waited for them.
  bool host_orders(c10::DeviceType device) const { return TraitsOf(device).host_orders; }
  /// Whether pieces of tensors on `device` are better sent point to point than by collectives, in
  /// gathers and in reductions.
  bool exchanges_gathers(c10::DeviceType device) const {
    return !gather_comm_.run && TraitsOf(device).exchanges;
  }
  bool exchanges_reductions(c10::DeviceType device) const {
    return !reduce_comm_.run && TraitsOf(device).exchanges;
  }
  /// Whether several collectives are launched as one.
  bool coalesces_gathers(c10::DeviceType device) const {
    return !gather_comm_.run && TraitsOf(device).coalesces;
  }
  bool coalesces_reductions(c10::DeviceType device) const {
    return !reduce_comm_.run && TraitsOf(device).coalesces;
  }

  /// Brings every rank's piece of every run to all; `own` are this rank's, and both are in `dtype`
  /// for a user's code, in bytes here. Where ranks exchange pieces these are in their places in the
  /// runs; elsewhere they may lie anywhere, the pieces of a run are equal, and without `coalesces`
  /// there is one run.
  PendingWorks AllGather(const std::vector<at::Tensor>& own, const std::vector<Cut>& runs,
                         at::ScalarType dtype) const;
  /// Without `exchanges`: outputs[i] becomes the sum of all ranks' pieces of runs[i], for this
  /// rank; or their average.
  PendingWorks ReduceScatter(const std::vector<at::Tensor>& outputs, const std::vector<Cut>& runs,
                             bool average) const;
  /// With `exchanges`: a reduction begins, in the order of all ranks.
  JointOp BeginReduction() const;
  /// With `exchanges`: every rank's piece of every run goes to that rank, and what rank r has for
  /// this one comes to inbox[r][run]. Part of `reduction`.
  PendingWorks ExchangePieces(const JointOp& reduction, const std::vector<Cut>& runs,
                              const std::vector<std::vector<at::Tensor>>& inbox) const;
  /// With `exchanges` and two replicas: swaps `output` for the other one's. Part of `reduction`.
  PendingWorks SwapReplicas(const JointOp& reduction, const at::Tensor& output,
                            const at::Tensor& inbox) const;
  /// Makes `tensor` the sum over the replicas, or their average.
  PendingWorks AllReduce(const at::Tensor& tensor, bool average) const;

  /// Gives `tensor` the values that the first rank of the shard group has.
  PendingWorks BroadcastFirst(const at::Tensor& tensor) const;

  /// Whether the backend divides on the way, without a pass of its own, in float32 and bfloat16:
  /// those that streams order, until one refuses to. If not, the caller scales.
  bool averages(c10::DeviceType device, at::ScalarType dtype) const;
  /// What gradients are multiplied with before they are summed in `dtype`: below one for float16
  /// only, whose sums may overflow (a power of two near the square root of the number of ranks, as
  /// torch's FSDP2 divides).
  double pre_scale(at::ScalarType dtype) const;

 private:
  /// How the backend for one kind of device works.
  struct BackendTraits {
    bool host_orders, exchanges, coalesces;
    bool runs_in_place;  ///< on the current stream, what is not asked for as `async`
  };

  BackendTraits TraitsOf(c10::DeviceType device) const;
  BackendTraits AskBackend(c10::DeviceType device) const;
  PendingWorks Ordered(WorkPtr work, const GroupPtr& group, const at::Tensor& tensor) const;
  template <typename Issue>
  WorkPtr AverageIfItCan(Issue issue) const;

  std::string gather_group_, reduce_group_;
  std::optional<std::string> replica_group_;
  std::shared_ptr<Departures> departures_;
  CustomComm gather_comm_, reduce_comm_;
  int64_t rank_, shards_ = 1, shard_rank_ = 0, replicas_ = 1;
  mutable bool refuses_average_ = false;                     // the backend, and so on every rank
  mutable std::mutex mutex_;                                 // of what follows
  mutable std::map<c10::DeviceType, BackendTraits> traits_;  // of the backends that have been asked
};

/// Waits for all `works` and forgets them. The first failure is thrown at once, as torch's
/// DistBackendError; the group is of no use after it, unless a peer has left the step
/// (PendingWorks). `what` names the operation: "the all-gather of unit layers.3".
void Await(PendingWorks& works, int64_t rank, const std::function<std::string()>& what);

}  // namespace hsdp_ckpt::hsdp
