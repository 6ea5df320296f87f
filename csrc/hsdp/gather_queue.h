#pragma once

#include <cstdint>
#include <deque>

#include "hsdp/unit.h"

namespace hsdp_ckpt::hsdp {

/// When backward starts the next unit's gather.
enum class BackwardPrefetch {
  kNone,  ///< at its use
  kPre,  ///< before the computation of the unit before it; on a device's streams halfway through it
  kPost,  ///< behind that, when its gradients are there
};

/// The all-gathers of one backward, in the one order that all ranks keep.
///
/// `Begin` settles the order, from Schedule::QueueBackward; how early a gather starts depends on
/// what this rank's backward reaches. A unit that it skips is gathered all the same when a later
/// one is reached, or at the end.
///
/// One unit's state in the queue, and what moves it:
///
///   from        call                                   to          what is done
///   kNotQueued  Begin, if its parameters are sharded   kQueued     it has a place in the order
///   kQueued     Unshard or StartThrough of it or of a  kNotQueued  its all-gather is issued
///               unit behind it, StartNext
///   kQueued     a prefetch, as the first in the queue  kAhead      its all-gather is issued
///   kAhead      Unshard of it, or whatever else waits  kNotQueued  nothing is left to do here
///               for the gather or drops it
///   any         Clear                                  kNotQueued  the queue forgets it
///
/// A started gather's own progress is ParamGroup::state(). While one unit is kAhead none is
/// prefetched, since each gather holds a whole unit's memory; what a user has named is gathered all
/// the same, and the last one named is the one that is kAhead. Thread safety: none.
class GatherQueue {
 public:
  enum class State { kNotQueued, kQueued, kAhead };

  /// `rank`: in the default group, for errors.
  GatherQueue(BackwardPrefetch prefetch, int64_t rank) : prefetch_(prefetch), rank_(rank) {}

  /// Queues the sharded ones of `backward_order`: the units whose forward has run, last one first.
  void Begin(const UnitSequence& backward_order);
  /// Starts the gather of `unit`, whose backward comes next, and all before it. Throws as the
  /// collectives do, naming rank and unit; so does Unshard.
  void Start(const UnitPtr& unit);
  /// Makes the full parameters of `unit`, whose gather has been started, usable on the current
  /// stream, and starts what is prefetched before its backward.
  void Unshard(const UnitPtr& unit);
  /// Starts what is prefetched halfway through the backward of `unit`.
  void Halfway(const Unit& unit);
  /// Starts what is prefetched when the gradients of `unit` are there.
  void GradientsComplete(const Unit& unit);
  /// Starts the gathers up to that of `unit`, if it is queued.
  void StartThrough(const UnitPtr& unit);
  /// Starts the first gather in the queue, which must not be empty.
  void StartNext();
  void Clear();

  bool empty() const { return queue_.empty(); }
  /// The first unit in the queue, which must not be empty.
  const UnitPtr& next() const { return queue_.front(); }

 private:
  State StateOf(const UnitPtr& unit) const;
  void PrefetchAt(BackwardPrefetch when, const Unit& unit);
  void PrefetchBefore(const Unit& unit);
  void PrefetchNext(const Unit& current);

  const BackwardPrefetch prefetch_;
  const int64_t rank_;
  std::deque<UnitPtr> queue_;
  UnitPtr ahead_;  // the last unit whose gather was started ahead of its use
};

}  // namespace hsdp_ckpt::hsdp
