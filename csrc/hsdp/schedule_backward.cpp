#include <torch/csrc/autograd/engine.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <thread>
#include <utility>

#include "hsdp/schedule.h"

namespace hsdp_ckpt::hsdp {
namespace {

constexpr size_t kReductionsInFlight =
    2;  // more would hold packed gradients without moving bytes any sooner
constexpr auto kPatience = std::chrono::milliseconds(200);
constexpr auto kPause = std::chrono::microseconds(50);

}  // namespace

bool Schedule::Runs(const Unit& unit) const {
  return std::any_of(active_.begin(), active_.end(),
                     [&](const Call& call) { return call.unit.get() == &unit; });
}

void Schedule::BeginBackward() {
  if (in_backward_) return;
  const std::shared_ptr<void> until_over = turn_->BeginBackward();
  in_backward_ = true;
  in_forward_too_ = !active_.empty();
  differentiates_ = false;
  error_ = nullptr;
  gather_queue_.clear();
  reduce_queue_.clear();
  for (const auto& unit : units_) {
    unit->arrived.assign(unit->group->trainable().size(), false);
    unit->arrivals = unit->inputs_arrived = 0;
    unit->ready = unit->complete = false;
  }
  const auto reduces = [this](const Unit& unit) {
    return unit.sync && !in_forward_too_ && !unit.group->trainable().empty();
  };
  for (auto unit = participants_.rbegin(); unit != participants_.rend(); ++unit) {
    if ((*unit)->group->state() == ParamGroup::State::kSharded) gather_queue_.push_back(*unit);
    if (reduces(**unit)) reduce_queue_.push_back(*unit);
  }
  for (const auto& unit : owing_) {
    if (reduces(*unit) && !Contains(participants_, unit)) reduce_queue_.push_back(unit);
  }
  OrderGathers();
  torch::autograd::Engine::get_default_engine().queue_callback(
      [weak = weak_from_this(), until_over] {
        if (const auto self = weak.lock()) self->EndBackward();
      });
}

// The order in which units are gathered is settled here; how early depends on what this rank's
// backward reaches.
void Schedule::OrderGathers() {
  const auto asked = [](const auto& unit) { return !unit->backward_prefetch.empty(); };
  if (std::none_of(participants_.begin(), participants_.end(), asked)) return;
  std::deque<std::shared_ptr<Unit>> ordered;
  const auto append = [&](const std::shared_ptr<Unit>& unit) {
    if (unit && Contains(gather_queue_, unit) && !Contains(ordered, unit)) ordered.push_back(unit);
  };
  for (auto unit = participants_.rbegin(); unit != participants_.rend(); ++unit) {
    append(*unit);
    for (const auto& weak : (*unit)->backward_prefetch) append(weak.lock());
  }
  gather_queue_ = std::move(ordered);
}

void Schedule::BeforeBackward(const std::shared_ptr<Unit>& unit) {
  BeginBackward();
  differentiates_ =
      differentiates_ || at::GradMode::is_enabled();  // create_graph: autograd's mode in its hooks
  UnshardForBackward(unit);
  unit->on_backward();
}

void Schedule::StartGathersUntil(const std::shared_ptr<Unit>& unit) {
  while (Contains(gather_queue_, unit)) {
    const std::shared_ptr<Unit> next = gather_queue_.front();
    gather_queue_.pop_front();
    Naming(*next, "all-gather", [&] { next->group->StartGather(); });
  }
}

void Schedule::UnshardForBackward(const std::shared_ptr<Unit>& unit) {
  BeginBackward();
  StartGathersUntil(unit);
  Naming(*unit, "all-gather", [&] { unit->group->StartGather(); });
  for (const auto& weak : unit->backward_prefetch) {
    if (const auto next = weak.lock()) StartGathersUntil(ahead_ = next);
  }
  if (unit->backward_prefetch.empty() && backward_prefetch_ == BackwardPrefetch::kPre)
    PrefetchBackward(*unit);
  Naming(*unit, "all-gather", [&] { unit->group->Unshard(); });
}

// One gather ahead of `current`, never two: each holds a whole unit.
void Schedule::PrefetchBackward(const Unit& current) {
  const bool is_ahead =
      ahead_ && ahead_.get() != &current && ahead_->group->state() == ParamGroup::State::kGathering;
  if (gather_queue_.empty() || is_ahead) return;
  ahead_ = gather_queue_.front();
  gather_queue_.pop_front();
  Naming(*ahead_, "all-gather", [&] { ahead_->group->StartGather(); });
}

void Schedule::WatchInputs(const std::shared_ptr<Unit>& unit,
                           const std::vector<at::Tensor>& inputs) {
  if (!unit->frozen) return;
  for (const at::Tensor& input : inputs) {
    if (!input.requires_grad()) continue;
    ++unit->inputs;
    input.register_hook(
        [weak = weak_from_this(), weak_unit = std::weak_ptr<Unit>(unit)](const at::Tensor&) {
          const auto self = weak.lock();
          const auto alive = weak_unit.lock();
          if (self && alive) self->InputArrived(alive);
        });
  }
}

void Schedule::InputArrived(const std::shared_ptr<Unit>& unit) {
  BeginBackward();
  ++unit->inputs_arrived;
  FreeIfOver(*unit);
}

// A parameter that is trained has been used for the last time when its gradient arrives. A frozen
// one may still be needed for the gradients of the unit's inputs.
void Schedule::FreeIfOver(Unit& unit) {
  if (!unit.reshard_after_backward || differentiates_ || Runs(unit)) return;
  if (!unit.complete && !unit.group->trainable().empty()) return;
  if (unit.frozen && unit.inputs_arrived < unit.inputs) return;
  unit.held = false;
  unit.group->Reshard();
}

void Schedule::GradArrived(const std::shared_ptr<Unit>& unit, size_t slot) {
  BeginBackward();
  if (unit->arrived[slot]) return;
  unit->arrived[slot] = true;
  if (++unit->arrivals < unit->arrived.size()) return;
  // All there. Should more come (a reentrant checkpoint runs backward piece by piece), they count
  // anew.
  unit->arrived.assign(unit->arrived.size(), false);
  unit->arrivals = 0;
  unit->complete = true;
  FreeIfOver(*unit);
  if (unit->backward_prefetch.empty() && backward_prefetch_ == BackwardPrefetch::kPost)
    PrefetchBackward(*unit);
  if (!unit->sync || in_forward_too_) return;
  unit->ready = true;
  if (Contains(reduce_queue_, unit)) {
    LaunchReady();
  } else {
    Launch(unit);
  }
}

void Schedule::LaunchReady() {
  while (!reduce_queue_.empty() && reduce_queue_.front()->ready) LaunchNext();
}

void Schedule::LaunchNext() {
  const std::shared_ptr<Unit> unit = reduce_queue_.front();
  reduce_queue_.pop_front();
  Launch(unit);
}

void Schedule::Launch(const std::shared_ptr<Unit>& unit) {
  unit->ready = false;
  if (Contains(reducing_, unit)) AdvanceReductions(0);
  // On a device, whose results are taken on the host long before they are there, this is what
  // bounds reductions in flight.
  for (; joining_.size() >= kReductionsInFlight; joining_.pop_front()) {
    const std::shared_ptr<Unit>& older = joining_.front();
    if (!older->group->trainable().empty()) older->group->reducer().ReleaseInputs();
  }
  joining_.push_back(unit);
  const auto start = [&] { unit->group->StartReduce(); };
  try {
    Naming(*unit, "reduction", start);
  } catch (const c10::DistBackendError&) {
    throw;
  } catch (const c10::Error&) {
    // A gradient that can't be reduced. It is gone, so that this rank now joins with zeros, as its
    // peers expect it to.
    KeepError();
    Naming(*unit, "reduction", start);
  }
  reducing_.push_back(unit);
  AdvanceReductions(kReductionsInFlight);
}

void Schedule::KeepError() {
  if (!error_) error_ = std::current_exception();
}

// All-reduces start in the order of the reductions, each when its reduce-scatter is over; results
// are taken in that order.
void Schedule::AdvanceReductions(size_t keep) {
  for (const auto& unit : reducing_) {
    Naming(*unit, "reduction", [&] { unit->group->reducer().Advance(false); });
    if (unit->group->reducer().scattering()) break;
  }
  while (!reducing_.empty()) {
    const std::shared_ptr<Unit> unit = reducing_.front();
    if (reducing_.size() > keep) {
      AwaitReduction(*unit);
    } else if (!Naming(*unit, "reduction", [&] { return unit->group->reducer().Advance(false); })) {
      break;
    }
    reducing_.pop_front();
    try {
      if (!unit->group->reducer().Keep()) unit->on_reduced();
    } catch (...) {
      KeepError();
      unit->group->reducer().Drop();
    }
  }
}

// A peer that has no gradient for this unit joins its reduction at the end of backward only, and to
// get there it may need a gather that this rank has not started. So nobody waits for a reduction
// with gathers left to start; while this rank still computes it gives the reduction some time
// first, because every gather started early holds a unit's memory.
void Schedule::AwaitReduction(const Unit& unit) {
  GradReducer& reducer = unit.group->reducer();
  const auto advance = [&](bool wait) {
    return Naming(unit, "reduction", [&] { return reducer.Advance(wait); });
  };
  auto patience = std::chrono::steady_clock::now() + kPatience;
  while (!gather_queue_.empty()) {
    if (advance(false)) return;
    if (std::chrono::steady_clock::now() > patience) {
      StartGathersUntil(std::shared_ptr<Unit>(gather_queue_.front()));
      patience = std::chrono::steady_clock::now() + kPatience;
    }
    std::this_thread::sleep_for(kPause);
  }
  advance(true);
}

bool Schedule::FreesAfterBackward(const Unit& unit) const {
  return unit.reshard_after_backward && !differentiates_ && !Runs(unit);
}

// Gathers that this rank had no use for: peers may wait for them before they can join a reduction.
// Two at a time, since each holds a whole unit; the older one is over when the peers have come to
// it too.
void Schedule::GatherTheRest() {
  for (std::shared_ptr<Unit> last; !gather_queue_.empty();) {
    const auto older = std::exchange(last, gather_queue_.front());
    StartGathersUntil(last);
    if (!older || !FreesAfterBackward(*older)) continue;
    // On their way there they reduce, and need this rank for that. Only afterwards may this rank
    // wait for a reduction.
    LaunchBefore(*older, kReductionsInFlight);
    Release(older);
    LaunchBefore(*older, SIZE_MAX);
  }
}

// Starts the reductions that come before `unit`'s, until `limit` are in flight.
void Schedule::LaunchBefore(const Unit& unit, size_t limit) {
  const auto place = [this](const Unit& wanted) {
    const auto at =
        std::find_if(participants_.rbegin(), participants_.rend(),
                     [&](const auto& participant) { return participant.get() == &wanted; });
    return at - participants_.rbegin();
  };
  while (!reduce_queue_.empty() && reducing_.size() < limit &&
         place(*reduce_queue_.front()) < place(unit)) {
    LaunchNext();
  }
}

void Schedule::EndBackward() {
  for (auto& unit : reduce_queue_) unit->ready = true;
  GatherTheRest();
  LaunchReady();
  AdvanceReductions(last_backward_ ? 0 : kReductionsInFlight);
  for (const auto& unit : units_) {
    if (FreesAfterBackward(*unit)) Release(unit);
    if (last_backward_ && !unit->group->trainable().empty()) unit->group->reducer().Join();
  }
  // What was not reduced has to be, by a later backward and perhaps of units that it does not run.
  for (const auto& unit : participants_) {
    if (!Contains(owing_, unit)) owing_.push_back(unit);
  }
  std::erase_if(owing_, [this](const auto& unit) {
    return unit->group->trainable().empty() ||
           (unit->sync && !in_forward_too_ && !unit->group->reducer().has_partial());
  });
  ahead_.reset();
  in_backward_ = false;
  backward_done_ = !in_forward_too_;
  on_backward_end_();
  for (const Call& call : active_) call.unit->on_backward();
  turn_->EndBackward();
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

}  // namespace hsdp_ckpt::hsdp
