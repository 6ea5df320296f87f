#include "hsdp/schedule.h"

#include <c10/util/ScopeExit.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <thread>
#include <utility>

namespace hsdp_ckpt {
namespace {

constexpr size_t kReductionsInFlight = 2;  // more would hold packed gradients without moving bytes any sooner
constexpr auto kPatience = std::chrono::milliseconds(200);
constexpr auto kPause = std::chrono::microseconds(50);

bool InBackward() { return torch::autograd::get_current_graph_task_id() != -1; }

template <typename Container>
bool Contains(const Container& units, const std::shared_ptr<Unit>& unit) {
  return std::find(units.begin(), units.end(), unit) != units.end();
}

}  // namespace

Schedule::Schedule(BackwardPrefetch backward_prefetch, int64_t rank, std::shared_ptr<Peers> peers,
                   std::function<void()> on_backward_end)
    : backward_prefetch_(backward_prefetch),
      rank_(rank),
      peers_(std::move(peers)),
      on_backward_end_(std::move(on_backward_end)),
      turn_(std::make_shared<Turn>([this] { return c10::str("rank ", rank_, ": module ", units_[0]->name(), ": "); })) {}

template <typename Step>
auto Schedule::Naming(const Unit& unit, const char* what, Step step) const {
  const auto message = [&](const char* cause) {
    std::string text = "rank " + std::to_string(rank_) + ": the " + what + " of module " + unit.name() + " failed: ";
    if (std::strstr(cause, "Could not resolve the process group") != nullptr) {
      return text +
             "its process group is gone. torch.distributed.destroy_process_group ends what a wrapped module can do; " +
             "after another init_process_group wrap the module anew";
    }
    return text + cause +
           "\nA peer has died, has raised an error of its own, or does not run this module: see what the other ranks say";
  };
  try {
    return step();
  } catch (const c10::DistBackendError& error) {
    C10_THROW_ERROR(DistBackendError, message(error.what_without_backtrace()));
  } catch (const c10::Error& error) {
    C10_THROW_ERROR(Error, message(error.what_without_backtrace()));
  } catch (const std::exception& error) {
    C10_THROW_ERROR(DistBackendError, message(error.what()));  // Gloo's own
  }
}

void Schedule::Add(const std::shared_ptr<Unit>& unit, std::vector<at::Tensor> full, std::vector<size_t> trainable) {
  if (!Contains(units_, unit)) units_.push_back(unit);
  if (in_backward_ && !InBackward()) unit->group->DropGrads();  // of one that raised
  unit->frozen = trainable.size() < full.size();
  unit->group->BindFull(std::move(full), std::move(trainable),
                        [weak = weak_from_this(), weak_unit = std::weak_ptr<Unit>(unit)](size_t slot) {
                          const auto self = weak.lock();
                          const auto alive = weak_unit.lock();
                          if (self && alive) self->GradArrived(alive, slot);
                        });
}

// -- forward

void Schedule::EnterForward(const std::shared_ptr<Unit>& unit, bool grad_enabled, const std::vector<at::Tensor>& inputs) {
  if (InBackward()) {
    // Activation checkpointing computes the forward again: no new pass, nothing to record.
    UnshardForBackward(unit);
    if (unit->inputs == 0) WatchInputs(unit, inputs);  // a reentrant one: nothing required gradients the first time
    return;
  }
  turn_->BeginForward();
  if (active_.empty()) BeginForward(unit);
  active_.push_back({unit, grad_enabled});
  Follow(unit);
  StartGather(*unit);
  PrefetchForward(*unit);
  Naming(*unit, "all-gather", [&] { unit->group->Unshard(); });
  if (!grad_enabled) return;
  if (!Contains(participants_, unit)) participants_.push_back(unit);
  WatchInputs(unit, inputs);
}

void Schedule::BeginForward(const std::shared_ptr<Unit>& outermost) {
  // What an earlier pass left behind (the root's parameters, a gather nobody used, a backward that raised) may be older
  // than the shards are now.
  if (in_backward_) {
    Reset();
  } else {
    for (const auto& unit : units_) {
      const bool kept = unit->held || !unit->reshard_after_backward;
      unit->outdated = differentiates_ && !kept;
      if (!differentiates_ && !kept) unit->group->Reshard();
    }
  }
  if (backward_done_) {
    for (const auto& unit : units_) unit->inputs = 0;
    participants_.clear();
  }
  backward_done_ = false;
  recorded_.clear();
  position_ = 0;
  on_track_ = true;
  // Another pass than the last one, which a peer may be about to repeat. A pass never seen is asked about call by call.
  if (outermost_ != outermost.get() && !sequences_[outermost.get()].empty()) Agree(outermost.get());
  outermost_ = outermost.get();
}

void Schedule::Follow(const std::shared_ptr<Unit>& unit) {
  const Sequence& sequence = sequences_[outermost_];
  if (position_ < sequence.size() && sequence[position_] == unit) {
    ++position_;
  } else {
    Agree(unit.get());
    on_track_ = false;
    // Some calls left out: from here on the last pass is a guide again.
    const auto later = std::find(sequence.begin() + static_cast<std::ptrdiff_t>(position_), sequence.end(), unit);
    if (later != sequence.end()) position_ = static_cast<size_t>(later - sequence.begin()) + 1;
  }
  recorded_.push_back(unit);
}

// For a forward.
void Schedule::StartGather(Unit& unit) {
  if (std::exchange(unit.outdated, false)) unit.group->Reshard();
  Naming(unit, "all-gather", [&] { unit.group->StartGather(); });
}

void Schedule::PrefetchForward(const Unit& unit) {
  const auto prefetch = [this](Unit& next) {
    if (!next.outdated) StartGather(next);  // it may not come, and what it was kept for would lack it
  };
  for (const auto& weak : unit.forward_prefetch) {
    if (const auto next = weak.lock()) prefetch(*next);
  }
  const Sequence& sequence = sequences_[outermost_];
  if (!unit.forward_prefetch.empty() || position_ >= sequence.size()) return;
  prefetch(*sequence[position_]);
}

void Schedule::LeaveForward(const std::shared_ptr<Unit>& unit, const std::vector<at::Tensor>& outputs) {
  for (const at::Tensor& output : outputs) {
    if (!output.requires_grad()) continue;
    output.register_hook([weak = weak_from_this(), weak_unit = std::weak_ptr<Unit>(unit)](const at::Tensor&) {
      const auto self = weak.lock();
      const auto alive = weak_unit.lock();
      if (self && alive) self->BeforeBackward(alive);
    });
  }
  if (InBackward()) return;
  const bool grad_enabled = active_.back().grad_enabled;
  active_.pop_back();
  // The outermost unit is needed first in backward, and so is the one that ran last: freeing them would only mean another
  // gather.
  const bool last = on_track_ && position_ == sequences_[outermost_].size() && recorded_.back() == unit;
  const bool keep = grad_enabled && (differentiates_ || !unit->reshard_after_forward.value_or(!active_.empty() && !last));
  if (!keep) Release(unit);
  if (!active_.empty()) return;
  EndForward();
  turn_->EndForward();
}

void Schedule::EndForward() {
  Sequence& sequence = sequences_[outermost_];
  const bool same = on_track_ && position_ == sequence.size();
  if (!same) Agree(nullptr);
  for (const auto& unit : units_) {
    if (!unit->held && unit->group->state() == ParamGroup::State::kGathering) Release(unit);
  }
  if (!same) sequence = recorded_;
  recorded_.clear();
}

void Schedule::AbortForward(const std::shared_ptr<Unit>& unit) {
  if (InBackward()) return;
  const auto at = std::find_if(active_.rbegin(), active_.rend(), [&](const Call& call) { return call.unit == unit; });
  if (at != active_.rend()) active_.erase(at.base() - 1, active_.end());
  on_track_ = false;
  const auto release = [&](const std::shared_ptr<Unit>& freed) {
    try {
      Release(freed);
    } catch (const std::exception&) {
      // The error that ended the forward is the one to hear of. With a gather's failed works forgotten this one frees.
      Release(freed);
    }
  };
  const auto end = c10::make_scope_exit([this] {
    if (active_.empty()) turn_->EndForward();
  });
  release(unit);
  if (!active_.empty()) return;
  for (const auto& other : units_) release(other);
}

void Schedule::Hold(const std::shared_ptr<Unit>& unit, bool wait) {
  unit->held = true;
  StartGather(*unit);
  if (wait) Naming(*unit, "all-gather", [&] { unit->group->Unshard(); });
}

void Schedule::Release(const std::shared_ptr<Unit>& unit) {
  unit->held = unit->outdated = false;
  unit->group->Reshard();
}

// -- backward

bool Schedule::Runs(const Unit& unit) const {
  return std::any_of(active_.begin(), active_.end(), [&](const Call& call) { return call.unit.get() == &unit; });
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
  torch::autograd::Engine::get_default_engine().queue_callback([weak = weak_from_this(), until_over] {
    if (const auto self = weak.lock()) self->EndBackward();
  });
}

// The order in which units are gathered is settled here; how early depends on what this rank's backward reaches.
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
  differentiates_ = differentiates_ || at::GradMode::is_enabled();  // create_graph: autograd's mode in its hooks
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
  if (unit->backward_prefetch.empty() && backward_prefetch_ == BackwardPrefetch::kPre) PrefetchBackward(*unit);
  Naming(*unit, "all-gather", [&] { unit->group->Unshard(); });
}

// One gather ahead of `current`, never two: each holds a whole unit.
void Schedule::PrefetchBackward(const Unit& current) {
  const bool is_ahead = ahead_ && ahead_.get() != &current && ahead_->group->state() == ParamGroup::State::kGathering;
  if (gather_queue_.empty() || is_ahead) return;
  ahead_ = gather_queue_.front();
  gather_queue_.pop_front();
  Naming(*ahead_, "all-gather", [&] { ahead_->group->StartGather(); });
}

void Schedule::WatchInputs(const std::shared_ptr<Unit>& unit, const std::vector<at::Tensor>& inputs) {
  if (!unit->frozen) return;
  for (const at::Tensor& input : inputs) {
    if (!input.requires_grad()) continue;
    ++unit->inputs;
    input.register_hook([weak = weak_from_this(), weak_unit = std::weak_ptr<Unit>(unit)](const at::Tensor&) {
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

// A parameter that is trained has been used for the last time when its gradient arrives. A frozen one may still be needed
// for the gradients of the unit's inputs.
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
  // All there. Should more come (a reentrant checkpoint runs backward piece by piece), they count anew.
  unit->arrived.assign(unit->arrived.size(), false);
  unit->arrivals = 0;
  unit->complete = true;
  FreeIfOver(*unit);
  if (unit->backward_prefetch.empty() && backward_prefetch_ == BackwardPrefetch::kPost) PrefetchBackward(*unit);
  if (!unit->sync || in_forward_too_) return;
  unit->ready = true;
  if (Contains(reduce_queue_, unit)) {
    LaunchReady();
  } else {
    Launch(unit);
  }
}

void Schedule::LaunchReady() {
  while (!reduce_queue_.empty() && reduce_queue_.front()->ready) {
    const std::shared_ptr<Unit> unit = reduce_queue_.front();
    reduce_queue_.pop_front();
    Launch(unit);
  }
}

void Schedule::Launch(const std::shared_ptr<Unit>& unit) {
  unit->ready = false;
  if (Contains(reducing_, unit)) AdvanceReductions(0);
  // On a device, whose results are taken on the host long before they are there, this is what bounds reductions in flight.
  for (; joining_.size() >= kReductionsInFlight; joining_.pop_front()) {
    const std::shared_ptr<Unit>& older = joining_.front();
    if (!older->group->trainable().empty()) older->group->reducer().Join();
  }
  joining_.push_back(unit);
  const auto start = [&] { unit->group->StartReduce(); };
  try {
    Naming(*unit, "reduction", start);
  } catch (const c10::DistBackendError&) {
    throw;
  } catch (const c10::Error&) {
    // A gradient that can't be reduced. It is gone, so that this rank now joins with zeros, as its peers expect it to.
    KeepError();
    Naming(*unit, "reduction", start);
  }
  reducing_.push_back(unit);
  AdvanceReductions(kReductionsInFlight);
}

void Schedule::KeepError() {
  if (!error_) error_ = std::current_exception();
}

// All-reduces start in the order of the reductions, each when its reduce-scatter is over; results are taken in that order.
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

// A peer that has no gradient for this unit joins its reduction at the end of backward only, and to get there it may need a
// gather that this rank has not started. So nobody waits for a reduction with gathers left to start; while this rank still
// computes it gives the reduction some time first, because every gather started early holds a unit's memory.
void Schedule::AwaitReduction(const Unit& unit) {
  GradReducer& reducer = unit.group->reducer();
  const auto advance = [&](bool wait) { return Naming(unit, "reduction", [&] { return reducer.Advance(wait); }); };
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

void Schedule::EndBackward() {
  const auto frees = [this](const Unit& unit) { return unit.reshard_after_backward && !differentiates_ && !Runs(unit); };
  // Gathers that this rank had no use for come first: peers may wait for them before they can join a reduction. Two at a
  // time: each holds a whole unit.
  for (std::shared_ptr<Unit> last; !gather_queue_.empty();) {
    const auto before = std::exchange(last, gather_queue_.front());
    StartGathersUntil(last);
    if (before && frees(*before)) Release(before);
  }
  for (auto& unit : reduce_queue_) unit->ready = true;
  LaunchReady();
  AdvanceReductions(last_backward_ ? 0 : kReductionsInFlight);
  for (const auto& unit : units_) {
    if (frees(*unit)) Release(unit);
    if (last_backward_ && !unit->group->trainable().empty()) unit->group->reducer().Join();
  }
  // What was not reduced has to be, by a later backward and perhaps of units that it does not run.
  for (const auto& unit : participants_) {
    if (!Contains(owing_, unit)) owing_.push_back(unit);
  }
  std::erase_if(owing_, [this](const auto& unit) {
    return unit->group->trainable().empty() || (unit->sync && !in_forward_too_ && !unit->group->reducer().has_partial());
  });
  ahead_.reset();
  in_backward_ = false;
  backward_done_ = backward_done_ || !in_forward_too_;
  on_backward_end_();
  for (const Call& call : active_) call.unit->on_backward();
  turn_->EndBackward();
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Schedule::FinishReductions() {
  AdvanceReductions(0);
  for (const auto& unit : units_) {
    if (!unit->group->trainable().empty()) unit->group->reducer().Join();
  }
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

std::optional<bool> Schedule::BeginRead(bool only_if_quiet) {
  const std::optional<bool> taken = turn_->BeginRead(only_if_quiet);
  if (!taken.value_or(false)) return taken;
  auto give_back = c10::make_scope_exit([this] { turn_->EndRead(); });
  if (!in_backward_) FinishReductions();  // one that raised has left what only the next forward or Reset can drop
  give_back.release();
  return true;
}

void Schedule::Reset() {
  const bool waited = turn_->BeginRead().value();  // for another thread; at the begin of a forward it is this one's already
  const auto give_back = c10::make_scope_exit([this, waited] {
    if (waited) turn_->EndRead();
  });
  std::exception_ptr late;
  try {
    if (!in_backward_) FinishReductions();
  } catch (...) {
    late = std::current_exception();
  }
  for (const auto& unit : units_) {
    // All units: one whose result could not be taken has left reducing_ already.
    if (!unit->group->trainable().empty()) unit->group->reducer().Drop();
    if (in_backward_) unit->group->DropGrads();
    Release(unit);
  }
  if (in_backward_) owing_.clear();
  reducing_.clear();
  ahead_.reset();
  gather_queue_.clear();
  reduce_queue_.clear();
  active_.clear();
  backward_done_ = backward_done_ || in_backward_;
  in_backward_ = differentiates_ = false;
  error_ = nullptr;
  if (late) std::rethrow_exception(late);
}

}  // namespace hsdp_ckpt
