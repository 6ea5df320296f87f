#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "hsdp/param_group.h"
#include "hsdp/peers.h"
#include "hsdp/turn.h"

namespace hsdp_ckpt::hsdp {

/// One unit as its root's Schedule sees it: parameters, and what Python wants to hear.
struct Unit {
  const std::string& name() const { return group->name(); }

  std::shared_ptr<ParamGroup> group;
  /// Whether forward frees the full parameters. Absent: unless backward needs them first (the
  /// outermost unit, the last one to run).
  std::optional<bool> reshard_after_forward;
  bool reshard_after_backward = true;
  bool sync = true;  // reduce gradients; else they stay with the full parameters and are added to
  /// Whose gathers start with this unit's, instead of those that the last pass suggests. Empty:
  /// what the last pass suggests.
  std::vector<std::weak_ptr<Unit>> forward_prefetch, backward_prefetch;
  /// The unit is about to be used in backward: Python puts the full parameters into the module, for
  /// a recomputation.
  std::function<void()> on_backward;
  /// The reduced gradients are there: Python names the tensors they go to.
  std::function<void()> on_reduced;

  // What the Schedule keeps here.
  bool frozen =
      false;  // some parameter is: its memory is needed until the inputs' gradients are computed
  bool held = false;      // unsharded by the user, for a forward to come
  bool outdated = false;  // kept for a graph of an earlier backward: a forward has to gather anew
  std::vector<bool> arrived;  // by trainable parameter, in this backward
  size_t arrivals = 0;
  bool complete = false;  // every trainable parameter's gradient has arrived in this backward
  size_t inputs = 0,
         inputs_arrived =
             0;  // forward's inputs that require gradients, of a unit with frozen parameters
  bool ready = false;
};

/// When the units of one root gather, compute, reduce and free.
///
/// All ranks of a group have to issue the same collectives in the same order, whatever each of them
/// finds in its graph:
///  - forward gathers in the order of the calls; the next one in the order of the last pass is
///  started ahead. A rank whose
///    calls are others than in the last pass asks its peers first whether theirs are too;
///  - backward gathers in the reverse of that order; a unit that this rank's backward skips is
///  gathered all the same when a
///    later one is reached, or at the end;
///  - reductions in that same reverse order; a unit that is not ready holds later ones back until
///  the end of backward.
///    Every unit whose forward ran since the last backward's end takes part, with zeros where it
///    has no gradient.
/// A backward with create_graph frees nothing, as the graph that it makes is one that no hook of a
/// unit announces: the next backward does; a forward gathers anew what it runs itself. A backward
/// that a forward calls leaves the units of that forward as they are and reduces nothing: the
/// backward that runs after the forward does. What a rank frees after forward therefore depends on
/// the calls alone, never on what its outputs look like. Errors of one rank (gradients that can't
/// be taken, hooks that raise) are kept until its peers have what they wait for, and raised at the
/// end of backward. Errors of collectives name this rank and the unit. Thread safety: one thread at
/// a time, and the turn says whose. Forwards, backwards, BeginRead and Reset may come from any
/// thread and wait for it; all other calls are for whoever has it, or for a time when nobody else
/// uses the modules. GIL: never needed here, and must not be held where a turn or a collective is
/// waited for; callbacks take it.
class Schedule : public std::enable_shared_from_this<Schedule> {
 public:
  enum class BackwardPrefetch { kNone, kPre, kPost };

  /// `peers`: between all ranks; null for one rank alone. `rank`: in the default group, for errors.
  Schedule(BackwardPrefetch backward_prefetch, int64_t rank, std::shared_ptr<Peers> peers,
           std::function<void()> on_backward_end);

  /// Adds a unit, or binds its parameters anew: `full` are its full parameters, `trainable` the
  /// indices of those that require gradients (see ParamGroup::BindFull). In the same order on all
  /// ranks.
  void Add(const std::shared_ptr<Unit>& unit, std::vector<at::Tensor> full,
           std::vector<size_t> trainable);
  /// Pre-forward: the full parameters are usable when this returns. Also during a recomputation
  /// inside backward. `inputs`: the tensors among the forward's arguments, of a unit with frozen
  /// parameters; others need not name them.
  void EnterForward(const std::shared_ptr<Unit>& unit, bool grad_enabled,
                    const std::vector<at::Tensor>& inputs);
  /// Post-forward. `outputs`: the tensors among the unit's results; those that require gradients
  /// announce its backward.
  void LeaveForward(const std::shared_ptr<Unit>& unit, const std::vector<at::Tensor>& outputs);
  /// Instead of LeaveForward when the forward raised: frees, and leaves the root ready for the next
  /// call. Harmless after a LeaveForward that raised.
  void AbortForward(const std::shared_ptr<Unit>& unit);
  /// Gathers outside of a forward, for one to come; `wait`: the full parameters are usable when
  /// this returns.
  void Hold(const std::shared_ptr<Unit>& unit, bool wait);
  /// Frees the full parameters of one unit now.
  void Release(const std::shared_ptr<Unit>& unit);
  /// Frees all full parameters and ends what is in flight: before anybody looks at or replaces the
  /// shards. Gradients of a backward that raised are dropped; those that a backward which was not
  /// the last has left on their way are taken.
  void Reset();
  /// Whether the next backward ends with all of its gradients taken. If not, the last ones may be
  /// taken by the next backward, and the computation goes on meanwhile.
  void SetLastBackward(bool last) { last_backward_ = last; }
  /// Takes the gradients that are on their way.
  void FinishReductions();
  /// The turn of somebody who reads the sharded parameters, see Turn::BeginRead. Takes the
  /// gradients that are on their way.
  std::optional<bool> BeginRead(bool only_if_quiet = false);
  Turn& turn() { return *turn_; }

 private:
  struct Call {
    std::shared_ptr<Unit> unit;
    bool grad_enabled;
  };
  using Sequence = std::vector<std::shared_ptr<Unit>>;

  void GradArrived(const std::shared_ptr<Unit>& unit, size_t slot);
  void InputArrived(const std::shared_ptr<Unit>& unit);
  void FreeIfOver(Unit& unit);
  void WatchInputs(const std::shared_ptr<Unit>& unit, const std::vector<at::Tensor>& inputs);
  void BeginForward(const std::shared_ptr<Unit>& outermost);
  void Follow(const std::shared_ptr<Unit>& unit);
  /// For a forward: of what the shards are now.
  void GatherAnew(Unit& unit);
  void GatherTheRest();
  void LaunchBefore(const Unit& unit, size_t limit);
  bool FreesAfterBackward(const Unit& unit) const;
  void PrefetchForward(const Unit& unit);
  void EndForward();
  void Agree(const Unit* unit);
  void BeginBackward();
  void BeforeBackward(const std::shared_ptr<Unit>& unit);
  void UnshardForBackward(const std::shared_ptr<Unit>& unit);
  void StartGathersUntil(const std::shared_ptr<Unit>& unit);
  void PrefetchBackward(const Unit& current);
  void OrderGathers();
  void LaunchReady();
  void LaunchNext();
  void Launch(const std::shared_ptr<Unit>& unit);
  void AdvanceReductions(size_t keep);
  void AwaitReduction(const Unit& unit);
  bool Runs(const Unit& unit) const;
  void EndBackward();
  void KeepError();
  int64_t IndexOf(const Unit* unit) const;
  /// Runs `step`; what it throws is thrown on with this rank, the unit and `what` in its message.
  template <typename Step>
  auto Naming(const Unit& unit, const char* what, Step step) const {
    try {
      return step();
    } catch (...) {
      Rethrow(unit, what);
    }
  }
  [[noreturn]] void Rethrow(const Unit& unit, const char* what) const;
  template <typename Container>
  static bool Contains(const Container& units, const std::shared_ptr<Unit>& unit) {
    return std::find(units.begin(), units.end(), unit) != units.end();
  }

  const BackwardPrefetch backward_prefetch_;
  const int64_t rank_;
  const std::shared_ptr<Peers> peers_;
  const std::function<void()> on_backward_end_;
  const std::shared_ptr<Turn> turn_;

  Sequence units_;
  std::map<const Unit*, Sequence>
      sequences_;  // by outermost unit: the forward calls of its last pass, repeats included
  const Unit* outermost_ = nullptr;  // of this pass, or the last one
  Sequence recorded_;                // the calls of this pass
  size_t position_ = 0;              // in its sequence: the call that is expected next
  bool on_track_ = false;            // this pass has followed its sequence so far
  std::vector<Call> active_;         // calls that have not returned, outermost first
  Sequence participants_;  // units with a forward since the last backward ended, by first call
  Sequence owing_;         // units that keep gradients which have not been reduced
  bool in_backward_ = false;
  bool in_forward_too_ = false;  // the backward was begun within a forward
  bool backward_done_ = false;
  bool last_backward_ = true;
  bool differentiates_ =
      false;  // the last backward has made a graph of its own, which uses the full parameters
  std::deque<std::shared_ptr<Unit>> gather_queue_, reduce_queue_, reducing_;
  std::deque<std::shared_ptr<Unit>>
      joining_;                  // the last reductions, whose inputs a device may still read
  std::shared_ptr<Unit> ahead_;  // whose gather backward has started ahead of its use
  std::exception_ptr error_;     // this rank's first one in this backward
};

}  // namespace hsdp_ckpt::hsdp
