#include "hsdp/reduce_queue.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "hsdp/unit_errors.h"

namespace hsdp_ckpt::hsdp {
namespace {

constexpr auto kPatience = std::chrono::milliseconds(200);
constexpr auto kPause = std::chrono::microseconds(50);

// Moves a reduction on; true when it is done.
bool Advance(int64_t rank, const Unit& unit, bool wait) {
  return Naming({rank, unit.name()}, "reduction",
                [&] { return unit.group->reducer().Advance(wait); });
}

}  // namespace

void ReduceQueue::Begin(const UnitSequence& units) {
  error_ = nullptr;
  queue_.clear();
  in_flight_ = kInFlight;
  for (const UnitPtr& unit : units) {
    queue_.push_back({unit, State::kWaiting});
    in_flight_ = std::max(in_flight_, unit->reductions_in_flight);
  }
}

void ReduceQueue::GradientsComplete(const UnitPtr& unit) {
  const auto entry = std::find_if(queue_.begin(), queue_.end(),
                                  [&](const Entry& queued) { return queued.unit == unit; });
  if (entry == queue_.end()) return Start(unit);
  entry->state = State::kReady;
  StartReady();
}

void ReduceQueue::AllReady() {
  for (Entry& entry : queue_) entry.state = State::kReady;
}

void ReduceQueue::StartReady() {
  while (!queue_.empty() && queue_.front().state == State::kReady) StartNext();
}

void ReduceQueue::StartNext() {
  const UnitPtr unit = std::move(queue_.front().unit);
  queue_.pop_front();
  Start(unit);
}

void ReduceQueue::Start(const UnitPtr& unit) {
  if (Contains(reducing_, unit)) Take(0);
  ReleaseInputs();
  last_started_ = unit;
  StartReduction(unit);
  reducing_.push_back(unit);
  TakeDuringBackward();
}

// On a device results are taken on the host long before they are there: this is what bounds the
// gradients that are in memory.
void ReduceQueue::ReleaseInputs() {
  if (last_started_ && last_started_->trains()) last_started_->group->reducer().ReleaseInputs();
}

void ReduceQueue::StartReduction(const UnitPtr& unit) {
  const UnitName who{rank_, unit->name()};
  const auto start = [&] { unit->group->StartReduce(); };
  try {
    Naming(who, "reduction", start);
  } catch (const c10::DistBackendError&) {
    throw;
  } catch (const c10::Error&) {
    // A gradient can't be reduced. It is gone, so that this rank now joins with zeros, as its peers
    // expect it to.
    KeepError();
    Naming(who, "reduction", start);
  }
}

void ReduceQueue::Take(size_t keep) {
  AdvanceAll();
  while (!reducing_.empty() && TakeOldest(keep)) {
  }
}

// Where this rank lacks gradients its host has to ask the device whether peers have them. To
// answer, their streams may need gathers that this rank would start only afterwards: such a result,
// and those behind it, are taken at the end of backward. What they keep in memory are shards.
void ReduceQueue::TakeDuringBackward() {
  AdvanceAll();
  while (!reducing_.empty() && !reducing_.front()->group->reducer().blocks_host()) {
    if (!TakeOldest(in_flight_)) return;
  }
}

bool ReduceQueue::TakeOldest(size_t keep) {
  const UnitPtr unit = reducing_.front();
  if (reducing_.size() > keep) {
    Await(*unit);
  } else if (!Advance(rank_, *unit, /*wait=*/false)) {
    return false;
  }
  reducing_.pop_front();
  TakeResult(*unit);
  return true;
}

// All-reduces start in the order of the reductions, each when its reduce-scatter is over.
void ReduceQueue::AdvanceAll() {
  for (const UnitPtr& unit : reducing_) {
    Advance(rank_, *unit, /*wait=*/false);
    if (unit->group->reducer().scattering()) break;
  }
}

// A peer that has no gradient for this unit joins its reduction at the end of backward only, and to
// get there it may need a gather that this rank has not started. So nobody waits for a reduction
// with gathers left to start; while this rank still computes it gives the reduction some time
// first, because every gather started early holds a unit's memory.
void ReduceQueue::Await(const Unit& unit) {
  auto patience = std::chrono::steady_clock::now() + kPatience;
  while (!gathers_.empty()) {
    if (Advance(rank_, unit, /*wait=*/false)) return;
    if (std::chrono::steady_clock::now() > patience) {
      gathers_.StartNext();
      patience = std::chrono::steady_clock::now() + kPatience;
    }
    std::this_thread::sleep_for(kPause);
  }
  Advance(rank_, unit, /*wait=*/true);
}

void ReduceQueue::TakeResult(const Unit& unit) {
  try {
    if (!unit.group->reducer().Keep()) unit.on_reduced();
  } catch (...) {
    KeepError();
    unit.group->reducer().Drop();
  }
}

void ReduceQueue::KeepError() {
  if (!error_) error_ = std::current_exception();
}

void ReduceQueue::RethrowKept() {
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ReduceQueue::Clear() {
  queue_.clear();
  reducing_.clear();
  last_started_.reset();
  error_ = nullptr;
}

}  // namespace hsdp_ckpt::hsdp
