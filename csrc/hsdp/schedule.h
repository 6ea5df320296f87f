#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "hsdp/forward_order.h"
#include "hsdp/gather_queue.h"
#include "hsdp/peers.h"
#include "hsdp/reduce_queue.h"
#include "hsdp/turn.h"
#include "hsdp/unit.h"

namespace hsdp_ckpt::hsdp {

/// Decides when the units of one root gather, compute, reduce and free. It hears of what forward
/// and backward do, and conducts those who know the order: ForwardOrder, GatherQueue, ReduceQueue.
///
/// All ranks of a group have to issue the same collectives in the same order, whatever each of them
/// finds in its graph:
///  - Forward gathers in the order of the calls; the next gather in the order of the last pass is
///    started ahead (ForwardOrder).
///  - Backward gathers in the reverse of that order (GatherQueue).
///  - Reductions go in that same reverse order (ReduceQueue). Every unit whose forward ran since
///    the last backward's end takes part, with zeros where it has no gradient.
///
/// A backward with create_graph frees nothing, as the graph that it makes is one that no hook of a
/// unit announces: the next backward does that keeps no graph; a forward gathers anew what it runs
/// itself. So do transforms of torch.func, whose graphs no hook sees. A backward
/// that a forward calls leaves the units of that forward as they are and reduces nothing: the
/// backward that runs after the forward does. What a rank frees after forward therefore depends on
/// the calls alone, never on what its outputs look like.
///
/// Errors of one rank (gradients that can't be taken, hooks that raise) are kept until its peers
/// have what they wait for, and raised at the end of backward. One that leaves a forward or
/// backward which peers need this rank in becomes theirs too (Departures), and all ranks meet
/// before they go on. Errors of collectives name this rank and the unit.
///
/// Thread safety: one thread at a time, and the turn says which one. Forwards, backwards, BeginRead
/// and Reset may come from any thread and wait for it; all other calls are for whoever has it, or
/// for a time when nobody else uses the modules. GIL: never needed here, and must not be held where
/// a turn or a collective is waited for; callbacks take it.
class Schedule : public std::enable_shared_from_this<Schedule> {
 public:
  /// `peers`: between all ranks; null for one rank alone. `rank`: in the default group, for errors.
  Schedule(BackwardPrefetch backward_prefetch, int64_t rank, std::shared_ptr<Peers> peers,
           std::function<void()> on_backward_end);

  /// Adds a unit, or binds its parameters anew: `full` are its full parameters, `trainable` the
  /// indices of those that require gradients (see ParamGroup::BindFull). In the same order on all
  /// ranks.
  void Add(const UnitPtr& unit, std::vector<FullParam> full, std::vector<size_t> trainable);
  /// Pre-forward: the full parameters are usable when this returns. Also during a recomputation
  /// inside backward.
  void EnterForward(const UnitPtr& unit, bool grad_enabled);
  /// A graph is made now that no output of a unit announces, as that of a backward with
  /// create_graph: full parameters stay until a backward has used it.
  void ExpectHiddenGraph() { has_hidden_graph_ = true; }
  /// Post-forward. `outputs`: the tensors among the unit's results; those that require gradients
  /// announce its backward.
  void LeaveForward(const UnitPtr& unit, const std::vector<at::Tensor>& outputs);
  /// Instead of LeaveForward when the forward raised: frees, and leaves the root ready for the next
  /// call. Harmless after a LeaveForward that raised.
  void AbortForward(const UnitPtr& unit);
  /// Starts a gather outside of a forward, for one to come.
  void StartUnshard(const UnitPtr& unit);
  /// The same, and the full parameters are usable when this returns.
  void Unshard(const UnitPtr& unit);
  /// Frees the full parameters of one unit now.
  void Release(const UnitPtr& unit);
  /// Ends what is in flight, and frees all full parameters, but for those that a graph needs which
  /// no output announces: before anybody looks at or replaces the shards. Gradients of a backward
  /// that raised are dropped; those that a backward which was not the last has left on their way
  /// are taken.
  void Reset();
  /// Whether the next backward ends with all of its gradients taken. If not, the last ones may be
  /// taken by the next backward, and the computation goes on meanwhile.
  void SetLastBackward(bool last) { last_backward_ = last; }
  /// Between backwards: reduces what those that were not to reduce have kept, as one that reduces
  /// would at its end, and frees what those were to keep. With `wait` all gradients are taken when
  /// this returns, else by FinishReductions at the latest. Collective.
  void FinalizeBackward(bool wait);
  /// Takes the gradients that are on their way.
  void FinishReductions();
  /// Whether units keep gradients that no backward has reduced yet; the same on all ranks.
  bool Owes() const { return !owing_.empty(); }
  /// The turn of somebody who reads the sharded parameters, see Turn::BeginRead. Takes the
  /// gradients that are on their way.
  ReadTurn BeginRead();
  /// The same for a reader who waits for nobody, see Turn::BeginReadIfQuiet.
  ReadTurn BeginReadIfQuiet();
  Turn& turn() { return *turn_; }

 private:
  /// What the root is at. A backward that a forward calls is kept apart, as it reduces nothing.
  ///
  ///   from                  event                     to
  ///   kForward              a backward begins         kBackward, or kBackwardInForward if a
  ///                                                   forward is under way
  ///   kBackward             it ends                   kBackwardDone
  ///   kBackwardInForward    it ends                   kForward
  ///   kBackwardDone         another backward begins   kBackward: of the same graph
  ///   kBackwardDone         a forward with gradients  kForward: its units are counted anew
  ///   kBackward(InForward)  Reset, once it raised     kBackwardDone
  enum class Phase { kForward, kBackward, kBackwardInForward, kBackwardDone };

  /// A call of a unit's forward that has not returned.
  struct Call {
    UnitPtr unit;
    bool grad_enabled;
  };

  /// What is about to begin when the ranks meet after an error.
  enum class Meeting : int64_t { kForward, kBackward };

  // Forward.
  void BeginForward(const UnitPtr& outermost);
  void CountForBackward(const UnitPtr& unit);
  void ForgetLastPass();
  static void Outdate(Unit& unit);
  void GatherAnew(Unit& unit);
  void PrefetchForward(const Unit& unit);
  void NoteFrozen(const UnitPtr& unit, const std::vector<at::Tensor>& outputs);
  bool FreesAfterForward(const Unit& unit, const Call& call, bool was_last) const;
  void EndForward();
  void ReleaseAfterError(const UnitPtr& unit);

  // Errors of one rank.
  void LeaveStep(const char* what);
  void MeetAfterError(Meeting meeting);
  std::vector<int64_t> StateWords(Meeting meeting) const;
  void CheckMeeting(const std::vector<std::vector<int64_t>>& all) const;
  void GoOnFrom(const std::vector<std::vector<int64_t>>& all);
  void ForgetStep();
  bool HasSentAll() const;
  bool GathersAnything() const;
  /// Whether this rank has left the step with an error that somebody here has heard of.
  bool has_told_error() const { return peers_ && peers_->departures()->has_raised(); }
  void EndReductions();
  void DropReduction(Unit& unit);

  // Backward.
  bool in_backward() const {
    return phase_ == Phase::kBackward || phase_ == Phase::kBackwardInForward;
  }
  void BeginBackward();
  void BackwardIsOver(int64_t number);
  void QueueBackward();
  void BeforeBackward(const UnitPtr& unit, uint64_t first_node);
  void UnshardInBackward(const UnitPtr& unit);
  void GradArrived(const UnitPtr& unit, size_t slot);
  void Halfway(Unit& unit);
  void ReducePassed();
  void FreePassed();
  void FreeAfterBackward(Unit& unit);
  bool FreesAfterBackward(const Unit& unit) const;
  bool Reduces(const Unit& unit) const;
  bool Keeps(const Unit& unit) const;
  bool IsRunning(const Unit& unit) const;
  void EndBackward();
  void FinishGathers();
  void StartUnqueued();
  void StartReductionsBefore(const Unit& unit, size_t limit);
  void NoteOwing();

  void AwaitReads();
  ReadTurn FinishFor(ReadTurn turn);
  void JoinReductions();
  void AnnounceBackward(const at::Tensor& output, const UnitPtr& unit);

  const int64_t rank_;
  const std::shared_ptr<Peers> peers_;  // null for one rank alone
  const std::function<void()> on_backward_end_;
  const std::shared_ptr<Turn> turn_;

  UnitSequence units_;
  ForwardOrder order_;
  std::vector<Call> active_;   // outermost first
  UnitSequence participants_;  // units with a forward since the last backward ended, by first call
  UnitSequence owing_;         // units that keep gradients which have not been reduced
  Phase phase_ = Phase::kForward;
  int64_t backwards_ = 0;       // begun
  bool may_be_missed_ = false;  // peers may need this rank, though its forward has called all units
  bool last_backward_ = true;   // what a user has said of the next backward
  bool has_hidden_graph_ = false;   // a graph uses full parameters, and no output announces that
  bool uses_hidden_graph_ = false;  // the backward under way may
  bool keeps_graph_ = false;        // the backward under way does
  UnitSequence begun_;              // units that this backward has come to and has not freed
  GatherQueue gathers_;
  ReduceQueue reductions_;
};

}  // namespace hsdp_ckpt::hsdp
