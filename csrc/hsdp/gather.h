#pragma once

#include <ATen/ATen.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "hsdp/collectives.h"
#include "hsdp/device_streams.h"
#include "hsdp/gather_plan.h"
#include "hsdp/shard_layout.h"

namespace hsdp_ckpt::hsdp {

/// What a gather takes a unit's parameters from: this rank's shards of them, and how their bytes
/// move.
struct Shards {
  std::shared_ptr<Collectives> collectives;  ///< among the ranks that have a shard each
  std::optional<ShardLayout> layout;         ///< of `flat`, in bytes of the shards' dtypes
  GatherPlan plan;
  at::Tensor flat;  ///< bytes: this rank's shards, perhaps on the host; undefined: there are none
  bool is_full = false;  ///< one shard, stored as it is used: these are the full parameters

  int64_t count() const { return collectives->shards(); }
  int64_t rank() const { return collectives->shard_rank(); }
};

/// The layout and the plan of shards of `params` among the ranks of `collectives`, without memory.
Shards PlanShards(std::shared_ptr<Collectives> collectives,
                  const std::vector<GatheredParam>& params, c10::DeviceType device);

/// Where this rank's shard of parameter `i` is in `shards.flat`.
uint8_t* ShardAddress(const Shards& shards, size_t i);

/// A gather of one unit: the buffers that its full parameters lie in, and what is on its way there.
///
///   nothing -> Allocate -> Send -> Join -> Unpack -> full parameters -> Free
///
/// Memory is allocated on the stream that is current then, where the parameters are used and freed;
/// the gather's own stream begins behind that one. Thread safety: one thread at a time.
class Gather {
 public:
  Gather(at::Device device, std::shared_ptr<DeviceStreams> streams)
      : device_(device), streams_(std::move(streams)) {}

  /// Begins a gather of `shards`, whose memory must live until Unpack, and whose plan until Free.
  /// What may run out of memory is over when this returns, and nothing has been sent.
  void Allocate(const Shards& shards);
  /// Starts the all-gather, if there is anything to gather, and what is `beside` it.
  void Send(const std::function<void()>& beside = nullptr);
  /// What has been started is over: the current stream may read the buffers, and may free them.
  /// Blocks the host where that orders the collectives. `unit`: its name, for errors.
  void Join(const std::string& unit);
  /// Puts what came packed into its place.
  void Unpack();
  /// Whether there are buffers.
  bool has_memory() const { return !full_.empty(); }
  /// The buffer that parameter `i` lies in, and where, in bytes.
  std::pair<at::Tensor, int64_t> PlaceOf(size_t i) const;
  /// Whether parameter `i` has a buffer of its own.
  bool IsFreedAlone(size_t i) const;
  void FreeOne(size_t i);
  /// With `keep` the next gather of the same shards has the full buffers again.
  void Free(bool keep);

 private:
  void AllGather();
  void AllocateFull(bool gathered_into);
  at::Tensor EmptyPacked(int64_t bytes) const;
  void Run(const std::vector<Move>& moves, const at::Tensor& from) const;

  at::TensorOptions ThisDevice() const { return at::TensorOptions(at::kByte).device(device_); }

  const at::Device device_;
  const std::shared_ptr<DeviceStreams> streams_;
  const Shards* shards_ = nullptr;   // those of Allocate
  std::vector<at::Tensor> full_;     // bytes, by full buffer of the plan
  const Shards* kept_of_ = nullptr;  // whose full buffers `kept_` are
  std::vector<at::Tensor> kept_;
  at::Tensor flat_;    // bytes: this rank's shards, where the computation is
  at::Tensor packed_;  // bytes: everybody's rows of the packed parameters by rank
  PendingWorks works_;
  DeviceStreams::Mark gathered_;
};

}  // namespace hsdp_ckpt::hsdp
