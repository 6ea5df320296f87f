#pragma once

#include <exception>
#include <memory>
#include <utility>

#include "hsdp/reduction.h"

namespace hsdp_ckpt::hsdp {

/// Reductions that a user's hook makes, with collectives of its own; only the flags are summed
/// here, which it does not see.
///
/// On a device's streams the hook is called when the gradients are there. Where the host waits for
/// collectives it would wait in the midst of a backward, for peers that may need a gather of this
/// rank's first, and perhaps in the group that gathers use: there it is called when the result is
/// taken, at the end of backward, in one order on all ranks.
class HookReduction final : public Reduction {
 public:
  HookReduction(std::shared_ptr<const UnitGrads> grads, CommHook hook)
      : Reduction(std::move(grads)), hook_(std::move(hook)) {}

  void Allocate() override;
  /// The hook divides.
  bool averages(const GradBucket&) const override { return true; }
  bool ends_with_backward() const override;
  void RethrowOfUser() override;

 protected:
  void Begin() override;
  void MoveOn(bool wait) override;

 private:
  void Reduce();
  void SumFlags(GradBucket& bucket, const at::Tensor& flags) const;
  void CallHook(const GradBucket& bucket, const at::Tensor& grad);

  const CommHook hook_;
  std::exception_ptr error_;  // of the hook, until the result is taken
};

}  // namespace hsdp_ckpt::hsdp
