#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "hsdp/param_group.h"

namespace hsdp_ckpt {

/// One unit as its root's Schedule sees it: parameters, and what Python wants to hear.
struct Unit {
  std::shared_ptr<ParamGroup> group;
  bool reshard_after_forward = true;
  /// The unit is about to be used in backward: Python puts the full parameters into the module, for a recomputation.
  std::function<void()> on_backward;
  /// The reduced gradients are there: Python names the tensors they go to.
  std::function<void()> on_reduced;
  /// Some parameter is frozen: autograd may need the parameters after the last gradient has been accumulated.
  bool free_late = false;

  std::vector<bool> arrived;  // by trainable parameter, in this backward
  size_t arrivals = 0;
  bool ready = false;
};

/// When the units of one root gather, compute, reduce and free.
///
/// All ranks of a group have to issue the same collectives in the same order, whatever each of them finds in its graph:
///  - forward gathers in the order of the calls; the next one in the order of the last pass is started ahead;
///  - backward gathers in the reverse of that order; a unit that this rank's backward skips is gathered all the same when a
///    later one is reached, or at the end;
///  - reductions in that same reverse order; a unit that is not ready holds later ones back until the end of backward.
///  Every
///    unit whose forward ran since the last backward's end takes part, with zeros where it has no gradient.
/// Assumed, as by torch's wrappers: all ranks call forward and backward equally often and run the same units in forward.
/// Thread safety: one thread at a time. GIL: never needed here; callbacks take it.
class Schedule : public std::enable_shared_from_this<Schedule> {
 public:
  enum class BackwardPrefetch { kNone, kPre, kPost };

  Schedule(BackwardPrefetch backward_prefetch, std::function<void()> on_backward_end);

  /// Adds a unit, or binds its parameters anew: `full` are its full parameters, `trainable` the indices of those that
  /// require gradients (see ParamGroup::BindFull).
  void Add(const std::shared_ptr<Unit>& unit, std::vector<at::Tensor> full, std::vector<size_t> trainable);
  /// Pre-forward: the full parameters are usable when this returns. Also during a recomputation inside backward.
  void EnterForward(const std::shared_ptr<Unit>& unit, bool grad_enabled);
  /// Post-forward. `outputs`: the tensors among the unit's results; those that require gradients announce its backward.
  void LeaveForward(const std::shared_ptr<Unit>& unit, const std::vector<at::Tensor>& outputs);
  /// Instead of LeaveForward when the forward raised: frees, and leaves the root ready for the next call.
  void AbortForward(const std::shared_ptr<Unit>& unit);
  /// Without synchronisation gradients stay with the full parameters and are added to; as it is when backward begins.
  void set_sync(bool sync) { sync_ = sync; }
  /// Frees all full parameters and drops what is in flight: before anybody looks at or replaces the shards.
  void Reset();

 private:
  void GradArrived(const std::shared_ptr<Unit>& unit, size_t slot);
  void BeginForward();
  void EndForward();
  void BeginBackward();
  void BeforeBackward(const std::shared_ptr<Unit>& unit);
  void UnshardForBackward(const std::shared_ptr<Unit>& unit);
  void PrefetchBackward();
  void LaunchReady();
  void Launch(const std::shared_ptr<Unit>& unit);
  void AdvanceReductions(size_t keep);
  void AwaitReduction(const Unit& unit);
  void EndBackward();

  const BackwardPrefetch backward_prefetch_;
  const std::function<void()> on_backward_end_;

  std::vector<std::shared_ptr<Unit>> units_;
  std::vector<std::shared_ptr<Unit>> sequence_;      // the forward calls of the last pass, repeats included
  std::vector<std::shared_ptr<Unit>> recorded_;      // those of this pass
  std::vector<std::shared_ptr<Unit>> participants_;  // units with a forward since the last backward ended, by first call
  int depth_ = 0;
  bool on_track_ = false;  // this pass has followed sequence_ so far
  bool in_backward_ = false;
  bool backward_done_ = false;
  bool sync_ = true;
  std::deque<std::shared_ptr<Unit>> gather_queue_, reduce_queue_, reducing_;
  std::shared_ptr<Unit> ahead_;  // whose gather backward has started ahead of its use
};

}  // namespace hsdp_ckpt
