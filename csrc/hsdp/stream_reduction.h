#pragma once

#include <memory>
#include <vector>

#include "hsdp/reduction.h"

namespace hsdp_ckpt::hsdp {

/// Reductions that run as collectives, on the device's reduce stream: the stream orders packing,
/// reduce-scatter, all-reduce and what comes after them. On the CPU, where there are no streams,
/// and with a backend that goes through the host (Gloo on CUDA), the works are waited for in
/// between.
///
/// A user's reduce-scatter is one of the collectives. Where the host waits for it this comes when
/// the result is taken, at the end of backward: see HookReduction.
///
/// All ranks get the same bits: the all-reduce leaves them so, and gradients of parameters without
/// dimensions are broadcast by the shard group's first rank.
class StreamReduction final : public Reduction {
 public:
  using Reduction::Reduction;

  void Allocate() override;
  bool averages(const GradBucket& bucket) const override;
  bool ends_with_backward() const override;

 protected:
  void Begin() override;
  void MoveOn(bool wait) override;

 private:
  bool on_cpu() const { return grads().device.is_cpu(); }
  /// Whether the works of all buckets are over.
  bool WorksAreOver() const;
  /// Waits for them. Works that are over are waited for too: it rethrows what went wrong.
  void TakeWorks();
  void Scatter();
  void StartAllReduces();
  void AllReduce(GradBucket& bucket);

  bool has_sent_ = false;
};

}  // namespace hsdp_ckpt::hsdp
