#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>

#include "hsdp/gather_queue.h"
#include "hsdp/unit.h"

namespace hsdp_ckpt::hsdp {

/// The reductions of one backward, in the one order that all ranks keep: the reverse of forward,
/// and behind it the units that owe a reduction of earlier gradients.
///
/// A unit that is not ready holds later ones back until the end of backward, when it joins with
/// zeros for the gradients that this rank lacks.
///
/// One reduction's state, and what moves it ("in flight": it is in the hands of its GradReducer):
///
///   from       call                                    to         what is done
///   -          Begin                                   kWaiting   it gets its place in the order
///   kWaiting   GradientsComplete, AllReady             kReady     -
///   kReady     these and StartReady, once it is the    in flight  the reduction starts; the inputs
///              first in the queue                                 of the one before it go back
///   kWaiting   StartWhile: peers need this rank to     in flight  the same, with zeros
///              get to a unit behind it
///   -          GradientsComplete of a unit that is     in flight  the same, once more
///              not queued: more gradients have come
///   in flight  Take, or the start of another one, as   -          on_reduced, or the sums wait
///              the oldest                                         for an all-reduce
///   any        Clear                                   -          the queue forgets it
///
/// A reduction that the last backward has left in flight may still be there when the next one
/// queues the same unit: it is taken first.
///
/// Errors of this rank alone (gradients that can't be taken, hooks that raise) are kept until its
/// peers have what they wait for: RethrowKept. Errors of collectives are thrown, naming rank and
/// unit. Thread safety: none.
class ReduceQueue {
 public:
  /// How far a reduction is that has not been started.
  enum class State { kWaiting, kReady };

  /// Reductions in flight, unless a unit says more. More would hold packed gradients without moving
  /// bytes any sooner, where they are not slower than the computation.
  static constexpr size_t kInFlight = 2;

  /// `gathers`: of the same backward; it must outlive the queue. `rank`: in the default group.
  ReduceQueue(GatherQueue& gathers, int64_t rank) : gathers_(gathers), rank_(rank) {}

  /// Reductions in flight from the next Begin on.
  size_t in_flight() const { return in_flight_; }
  /// Queues `units`, in their order. Errors of an earlier backward are forgotten.
  void Begin(const UnitSequence& units);
  /// The gradients of `unit` are there. Starts whatever may start now.
  void GradientsComplete(const UnitPtr& unit);
  /// Backward has come to its end: what has no gradient by now will get none.
  void AllReady();
  /// Starts the ready reductions at the head of the queue.
  void StartReady();
  /// Starts the first reductions of the queue, as long as `comes_before` says so of their unit and
  /// fewer than `limit` are in flight.
  template <typename Predicate>
  void StartWhile(Predicate comes_before, size_t limit) {
    while (!queue_.empty() && reducing_.size() < limit && comes_before(*queue_.front().unit)) {
      StartNext();
    }
  }
  /// Starts the reductions at the head of the queue whose gradients are there, or of which
  /// `is_passed` says that no more come.
  template <typename Predicate>
  void StartPassed(Predicate is_passed) {
    while (!queue_.empty()) {
      const Entry& first = queue_.front();
      if (first.state == State::kWaiting && !is_passed(*first.unit)) return;
      StartNext();
    }
  }
  /// The current stream waits until a device has read the gradients that the last reduction was
  /// given, and gets their memory.
  void ReleaseInputs();
  /// Takes the results that are there, and waits for the oldest until `keep` are in flight. What
  /// peers need of this rank to get there has been started.
  void Take(size_t keep);
  /// Throws this rank's first error since Begin, and forgets it.
  void RethrowKept();
  void Clear();

  /// Whether no reduction is left to start.
  bool all_started() const { return queue_.empty(); }

 private:
  struct Entry {
    UnitPtr unit;
    State state;
  };

  void StartNext();
  void Start(const UnitPtr& unit);
  void StartReduction(const UnitPtr& unit);
  void TakeDuringBackward();
  bool TakeOldest(size_t keep);
  void AdvanceAll();
  void Await(const Unit& unit);
  void TakeResult(const Unit& unit);
  void KeepError();

  GatherQueue& gathers_;
  const int64_t rank_;
  size_t in_flight_ = kInFlight;
  std::deque<Entry> queue_;       // kWaiting or kReady, in the order of all ranks
  std::deque<UnitPtr> reducing_;  // in flight, oldest first
  UnitPtr last_started_;          // whose inputs a device may still read
  std::exception_ptr error_;
};

}  // namespace hsdp_ckpt::hsdp
