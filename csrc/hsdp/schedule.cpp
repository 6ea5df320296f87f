#include "hsdp/schedule.h"

#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <chrono>
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

Schedule::Schedule(BackwardPrefetch backward_prefetch, std::function<void()> on_backward_end)
    : backward_prefetch_(backward_prefetch), on_backward_end_(std::move(on_backward_end)) {}

void Schedule::Add(const std::shared_ptr<Unit>& unit, std::vector<at::Tensor> full, std::vector<size_t> trainable) {
  if (!Contains(units_, unit)) units_.push_back(unit);
  unit->free_late = trainable.size() < full.size();
  unit->group->BindFull(std::move(full), std::move(trainable),
                        [weak = weak_from_this(), weak_unit = std::weak_ptr<Unit>(unit)](size_t slot) {
                          const auto self = weak.lock();
                          const auto alive = weak_unit.lock();
                          if (self && alive) self->GradArrived(alive, slot);
                        });
}

void Schedule::EnterForward(const std::shared_ptr<Unit>& unit, bool grad_enabled) {
  if (InBackward()) {
    // Activation checkpointing computes the forward again: no new pass, nothing to record.
    UnshardForBackward(unit);
    return;
  }
  if (depth_++ == 0) BeginForward();
  unit->group->Unshard();
  recorded_.push_back(unit);
  const size_t next = recorded_.size();
  on_track_ = on_track_ && next <= sequence_.size() && sequence_[next - 1] == unit;
  if (on_track_ && next < sequence_.size()) sequence_[next]->group->StartGather();
  if (grad_enabled && !Contains(participants_, unit)) participants_.push_back(unit);
}

void Schedule::BeginForward() {
  // What an earlier pass left behind (the root's parameters, a gather nobody used, a backward that raised) may be older
  // than the shards are now.
  if (in_backward_) {
    Reset();
    depth_ = 1;  // this call's own
  } else {
    for (const auto& unit : units_) unit->group->Reshard();
  }
  if (backward_done_) participants_.clear();
  backward_done_ = false;
  recorded_.clear();
  on_track_ = true;
}

void Schedule::LeaveForward(const std::shared_ptr<Unit>& unit, const std::vector<at::Tensor>& outputs) {
  bool needed = false;
  for (const at::Tensor& output : outputs) {
    if (!output.requires_grad()) continue;
    needed = true;
    output.register_hook([weak = weak_from_this(), weak_unit = std::weak_ptr<Unit>(unit)](const at::Tensor&) {
      const auto self = weak.lock();
      const auto alive = weak_unit.lock();
      if (self && alive) self->BeforeBackward(alive);
    });
  }
  if (InBackward()) return;
  --depth_;
  // The root is needed first in backward, and so is the unit that ran last: freeing them would only mean another gather.
  const bool last = on_track_ && recorded_.size() == sequence_.size() && recorded_.back() == unit;
  const bool keep = needed && (depth_ == 0 || !unit->reshard_after_forward || last);
  if (!keep) unit->group->Reshard();
  if (depth_ == 0) EndForward();
}

void Schedule::EndForward() {
  for (const auto& unit : sequence_) {
    if (unit->group->state() == ParamGroup::State::kGathering) unit->group->Reshard();
  }
  if (sequence_ != recorded_) sequence_ = recorded_;
  recorded_.clear();
}

void Schedule::AbortForward(const std::shared_ptr<Unit>& unit) {
  if (InBackward()) return;
  unit->group->Reshard();
  on_track_ = false;
  if (--depth_ > 0) return;
  for (const auto& other : units_) other->group->Reshard();
}

void Schedule::BeginBackward() {
  if (in_backward_) return;
  in_backward_ = true;
  gather_queue_.clear();
  reduce_queue_.clear();
  for (auto unit = participants_.rbegin(); unit != participants_.rend(); ++unit) {
    (*unit)->arrived.assign((*unit)->group->trainable().size(), false);
    (*unit)->arrivals = 0;
    (*unit)->ready = false;
    if ((*unit)->group->state() == ParamGroup::State::kSharded) gather_queue_.push_back(*unit);
    if (sync_ && !(*unit)->group->trainable().empty()) reduce_queue_.push_back(*unit);
  }
  torch::autograd::Engine::get_default_engine().queue_callback([weak = weak_from_this()] {
    if (const auto self = weak.lock()) self->EndBackward();
  });
}

void Schedule::BeforeBackward(const std::shared_ptr<Unit>& unit) {
  BeginBackward();
  UnshardForBackward(unit);
  unit->on_backward();
}

void Schedule::UnshardForBackward(const std::shared_ptr<Unit>& unit) {
  BeginBackward();
  if (Contains(gather_queue_, unit)) {
    while (true) {
      const std::shared_ptr<Unit> next = gather_queue_.front();
      gather_queue_.pop_front();
      next->group->StartGather();
      if (next == unit) break;
    }
  }
  unit->group->Unshard();
  if (backward_prefetch_ == BackwardPrefetch::kPre) PrefetchBackward();
}

// One gather ahead, never two: each holds a whole unit.
void Schedule::PrefetchBackward() {
  if (gather_queue_.empty() || (ahead_ && ahead_->group->state() == ParamGroup::State::kGathering)) return;
  ahead_ = gather_queue_.front();
  gather_queue_.pop_front();
  ahead_->group->StartGather();
}

void Schedule::GradArrived(const std::shared_ptr<Unit>& unit, size_t slot) {
  BeginBackward();
  unit->arrived.resize(unit->group->trainable().size(), false);
  if (unit->arrived[slot]) return;
  unit->arrived[slot] = true;
  if (++unit->arrivals < unit->arrived.size()) return;
  // All there. Should more come (a reentrant checkpoint runs backward piece by piece), they count anew.
  unit->arrived.assign(unit->arrived.size(), false);
  unit->arrivals = 0;
  if (!unit->free_late) unit->group->Reshard();
  if (backward_prefetch_ == BackwardPrefetch::kPost) PrefetchBackward();
  if (!sync_) return;
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
  unit->group->StartReduce();
  reducing_.push_back(unit);
  AdvanceReductions(kReductionsInFlight);
}

// All-reduces start in the order of the reductions, each when its reduce-scatter is over; results are taken in that order.
void Schedule::AdvanceReductions(size_t keep) {
  for (const auto& unit : reducing_) {
    unit->group->reducer().Advance(false);
    if (unit->group->reducer().scattering()) break;
  }
  while (!reducing_.empty()) {
    const std::shared_ptr<Unit> unit = reducing_.front();
    if (reducing_.size() > keep) {
      AwaitReduction(*unit);
    } else if (!unit->group->reducer().Advance(false)) {
      break;
    }
    reducing_.pop_front();
    if (!unit->group->reducer().Keep()) unit->on_reduced();
  }
}

// A peer that has no gradient for this unit joins its reduction at the end of backward only, and to get there it may need a
// gather that this rank has not started. So nobody waits for a reduction with gathers left to start; while this rank still
// computes it gives the reduction some time first, because every gather started early holds a unit's memory.
void Schedule::AwaitReduction(const Unit& unit) {
  GradReducer& reducer = unit.group->reducer();
  auto patience = std::chrono::steady_clock::now() + kPatience;
  while (!gather_queue_.empty()) {
    if (reducer.Advance(false)) return;
    if (std::chrono::steady_clock::now() > patience) {
      gather_queue_.front()->group->StartGather();
      gather_queue_.pop_front();
      patience = std::chrono::steady_clock::now() + kPatience;
    }
    std::this_thread::sleep_for(kPause);
  }
  reducer.Advance(true);
}

void Schedule::EndBackward() {
  // Gathers that this rank had no use for come first: peers may wait for them before they can join a reduction.
  for (; !gather_queue_.empty(); gather_queue_.pop_front()) gather_queue_.front()->group->StartGather();
  for (auto& unit : reduce_queue_) unit->ready = true;
  LaunchReady();
  AdvanceReductions(0);
  for (const auto& unit : units_) {
    unit->group->Reshard();
    if (!unit->group->trainable().empty()) unit->group->reducer().Join();
  }
  ahead_.reset();
  in_backward_ = false;
  // Under no_sync the gradients still have to be reduced, by a later backward and of units it may not run itself.
  backward_done_ = sync_;
  on_backward_end_();
}

void Schedule::Reset() {
  for (const auto& unit : units_) {
    // All units: one whose result could not be taken has left reducing_ already.
    if (!unit->group->trainable().empty()) unit->group->reducer().Drop();
    if (in_backward_) unit->group->DropGrads();
  }
  reducing_.clear();
  ahead_.reset();
  gather_queue_.clear();
  reduce_queue_.clear();
  for (const auto& unit : units_) unit->group->Reshard();
  depth_ = 0;
  backward_done_ = backward_done_ || in_backward_;
  in_backward_ = false;
}

}  // namespace hsdp_ckpt
