#pragma once

#include <future>

#include "hsdp/reduction.h"

namespace hsdp_ckpt::hsdp {

/// Reductions that the host orders: Gloo's on the CPU, where ranks swap pieces of gradients point
/// to point.
///
/// The gradients are sent as they are (bfloat16 for bfloat16 parameters), and each rank sums what
/// it gets in the order of the ranks, in float32: the same bits in every run, and on every replica.
/// Messages are posted in the caller's thread, in one order on all ranks; waiting, sums and
/// the all-reduce happen in the process's two background threads (background.h), beside the
/// computation. The caller never has to start the all-reduce: Start goes straight to kAllReduce.
class HostReduction final : public Reduction {
 public:
  using Reduction::Reduction;

  void Allocate() override;
  bool averages(const GradBucket&) const override { return false; }

 protected:
  void Begin() override;
  void MoveOn(bool wait) override;

 private:
  void PostPieces(const JointOp& op, GradBucket& bucket) const;

  std::future<void> done_;  // what the background threads do for this reduction
};

}  // namespace hsdp_ckpt::hsdp
