#include "hsdp/gather_queue.h"

#include <utility>

#include "hsdp/unit_errors.h"

namespace hsdp_ckpt::hsdp {
namespace {

void StartGather(int64_t rank, const UnitPtr& unit) {
  Naming({rank, unit->name()}, "all-gather", [&] { unit->group->StartGather(); });
}

}  // namespace

void GatherQueue::Begin(const UnitSequence& backward_order) {
  queue_.clear();
  const auto append = [this](const UnitPtr& unit) {
    const bool sharded = unit->group->state() == ParamGroup::State::kSharded;
    if (sharded && !Contains(queue_, unit)) queue_.push_back(unit);
  };
  for (const UnitPtr& unit : backward_order) {
    append(unit);
    for (const auto& weak : unit->backward_prefetch) {
      const UnitPtr named = weak.lock();
      if (named && Contains(backward_order, named)) append(named);
    }
  }
}

GatherQueue::State GatherQueue::StateOf(const UnitPtr& unit) const {
  if (Contains(queue_, unit)) return State::kQueued;
  const bool gathering = unit->group->state() == ParamGroup::State::kGathering;
  return unit == ahead_ && gathering ? State::kAhead : State::kNotQueued;
}

// Where the host waits for this gather, the next one is under way meanwhile. On a stream nobody
// waits, and once this one is unpacked what it was unpacked from is free.
void GatherQueue::Start(const UnitPtr& unit) {
  StartThrough(unit);
  StartGather(rank_, unit);
  if (!unit->group->gathers_on_stream()) PrefetchBefore(*unit);
}

void GatherQueue::Unshard(const UnitPtr& unit) {
  Naming({rank_, unit->name()}, "all-gather", [&] { unit->group->Unshard(); });
  if (unit->group->gathers_on_stream()) PrefetchBefore(*unit);
}

void GatherQueue::PrefetchBefore(const Unit& unit) {
  for (const auto& weak : unit.backward_prefetch) {
    const UnitPtr named = weak.lock();
    if (!named) continue;
    ahead_ = named;
    StartThrough(named);
  }
  if (!unit.has_halfway()) PrefetchAt(BackwardPrefetch::kPre, unit);
}

void GatherQueue::Halfway(const Unit& unit) { PrefetchAt(BackwardPrefetch::kPre, unit); }

void GatherQueue::GradientsComplete(const Unit& unit) { PrefetchAt(BackwardPrefetch::kPost, unit); }

// What a user has named has been started at its own time.
void GatherQueue::PrefetchAt(BackwardPrefetch when, const Unit& unit) {
  if (prefetch_ == when && unit.backward_prefetch.empty()) PrefetchNext(unit);
}

void GatherQueue::StartThrough(const UnitPtr& unit) {
  while (StateOf(unit) == State::kQueued) StartNext();
}

void GatherQueue::StartNext() {
  const UnitPtr next = std::move(queue_.front());
  queue_.pop_front();
  StartGather(rank_, next);
}

void GatherQueue::PrefetchNext(const Unit& current) {
  const bool one_is_ahead = ahead_ && ahead_.get() != &current && StateOf(ahead_) == State::kAhead;
  if (queue_.empty() || one_is_ahead) return;
  ahead_ = queue_.front();
  StartNext();
}

void GatherQueue::Clear() {
  queue_.clear();
  ahead_.reset();
}

}  // namespace hsdp_ckpt::hsdp
