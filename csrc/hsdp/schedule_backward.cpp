// The backward's side of the schedule.
#include <c10/util/ScopeExit.h>
#include <torch/csrc/autograd/engine.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "hsdp/outside_of_transforms.h"
#include "hsdp/schedule.h"

namespace hsdp_ckpt::hsdp {

// -- A backward begins

void Schedule::BeginBackward() {
  if (in_backward()) return;
  MeetAfterError(Meeting::kBackward);
  const std::shared_ptr<void> until_over = turn_->BeginBackward();
  phase_ = active_.empty() ? Phase::kBackward : Phase::kBackwardInForward;
  uses_hidden_graph_ = has_hidden_graph_;
  keeps_graph_ = torch::autograd::get_current_graph_task_keep_graph();
  has_hidden_graph_ = has_hidden_graph_ && keeps_graph_;
  begun_.clear();
  for (const UnitPtr& unit : units_) {
    const bool has_run = unit->backward.graph_task != -1;
    if (has_run) unit->missed_halfway = !unit->backward.is_halfway || unit->backward.is_late;
    unit->backward.Begin(unit->group->trainable().size());
  }
  QueueBackward();
  // What the callback owns goes with it, or with a backward that has raised and never calls it.
  const std::shared_ptr<void> until_gone(
      nullptr, [weak = weak_from_this(), until_over, number = ++backwards_](void*) {
        if (const auto self = weak.lock()) self->BackwardIsOver(number);
      });
  torch::autograd::Engine::get_default_engine().queue_callback(
      [weak = weak_from_this(), until_gone] {
        const OutsideOfTransforms outside;
        if (const auto self = weak.lock()) self->EndBackward();
      });
}

// Peers are told of a backward that has raised while its error is on its way up.
void Schedule::BackwardIsOver(int64_t number) {
  if (in_backward() && number == backwards_ && !HasSentAll()) LeaveStep("backward");
}

void Schedule::QueueBackward() {
  const UnitSequence backward_order(participants_.rbegin(), participants_.rend());
  UnitSequence gathered;
  for (const UnitPtr& unit : backward_order) {
    if (unit->unshard_in_backward && !unit->idle_in_backward) gathered.push_back(unit);
  }
  gathers_.Begin(gathered);
  UnitSequence reduced;
  for (const UnitPtr& unit : backward_order) {
    if (Reduces(*unit)) reduced.push_back(unit);
  }
  for (const UnitPtr& unit : owing_) {
    if (Reduces(*unit) && !Contains(participants_, unit)) reduced.push_back(unit);
  }
  reductions_.Begin(reduced);
  for (const UnitPtr& unit : participants_) {
    if (unit->trains()) unit->group->ExpectGrads(/*kept=*/Keeps(*unit));
  }
}

bool Schedule::Reduces(const Unit& unit) const {
  return unit.sync && unit.trains() && phase_ != Phase::kBackwardInForward;
}

// A backward that a forward calls keeps nothing for long: what runs after the forward reduces.
bool Schedule::Keeps(const Unit& unit) const {
  return !unit.sync && unit.trains() && phase_ == Phase::kBackward;
}

// -- A unit in backward

void Schedule::BeforeBackward(const UnitPtr& unit, uint64_t first_node) {
  BeginBackward();
  // In its hooks autograd's mode tells of create_graph.
  has_hidden_graph_ = has_hidden_graph_ || at::GradMode::is_enabled();
  UnshardInBackward(unit);
  unit->backward.graph_task = torch::autograd::get_current_graph_task_id();
  unit->backward.first_node = std::min(unit->backward.first_node, first_node);
  if (!Contains(begun_, unit)) begun_.push_back(unit);
  if (unit->unshard_in_backward) unit->on_backward();
}

void Schedule::UnshardInBackward(const UnitPtr& unit) {
  BeginBackward();
  FreePassed();
  for (const UnitPtr& begun : begun_) {
    const bool is_late = begun != unit && begun->has_halfway() && !begun->backward.is_halfway;
    begun->backward.is_late = begun->backward.is_late || is_late;
  }
  if (unit->unshard_in_backward) gathers_.Start(unit);
  if (unit->group->gathers_on_stream()) ReducePassed();
  if (unit->unshard_in_backward) gathers_.Unshard(unit);
}

// Peers that have the gradients which this rank lacks have started their reductions, and their
// streams wait for them before they come to the gathers that this rank's computation needs next.
// So it takes part, with zeros, before its own stream waits for a gather.
void Schedule::ReducePassed() {
  const auto node = torch::autograd::get_current_node();
  if (node == nullptr || uses_hidden_graph_ || phase_ != Phase::kBackward) return;
  // Which units an older graph than the last forward's has is not known.
  const bool is_of_last_forward =
      std::any_of(participants_.begin(), participants_.end(),
                  [&](const UnitPtr& unit) { return unit->first_node <= node->sequence_nr(); });
  if (!is_of_last_forward) return;
  const int graph_task = torch::autograd::get_current_graph_task_id();
  reductions_.StartPassed([&](const Unit& unit) {
    // Outside of its forward it may have been used at any time.
    const bool is_shown = unit.unsharded_by_user || !unit.reshard_after_backward;
    const BackwardProgress& backward = unit.backward;
    const bool has_begun = backward.graph_task != -1;
    const uint64_t first_node = has_begun ? backward.first_node : unit.first_node;
    const bool is_known = first_node != UINT64_MAX && !is_shown && !backward.in_parts &&
                          (!has_begun || backward.graph_task == graph_task);
    return is_known && node->sequence_nr() < first_node && node->device() == unit.group->device();
  });
}

void Schedule::GradArrived(const UnitPtr& unit, size_t slot) {
  BeginBackward();
  BackwardProgress& backward = unit->backward;
  const bool begun = backward.graph_task != -1;
  const int graph_task = torch::autograd::get_current_graph_task_id();
  // A reentrant checkpoint within the unit runs a backward of its own. There may be more of them.
  backward.in_parts = backward.in_parts || (begun && graph_task != backward.graph_task);
  const bool is_complete = backward.GradArrived(slot, unit->group->grad_numel(slot));
  // Mostly parameters are used for the last time when their gradients arrive. FreePassed has the
  // rest.
  const bool is_last_use = !unit->frozen && !unit->is_watched && !backward.in_parts;
  if (is_last_use && FreesAfterBackward(*unit)) {
    if (!is_complete) unit->group->FreeTrained(slot);
    if (is_complete && !unit->group->has_views()) {
      FreeAfterBackward(*unit);
      std::erase(begun_, unit);
    }
  }
  if (!is_complete) return Halfway(*unit);
  gathers_.GradientsComplete(*unit);
  if (Reduces(*unit)) reductions_.GradientsComplete(unit);
  if (Keeps(*unit)) unit->group->KeepGrads();
}

// Half of the unit's computation is left. The device has had the other half to read what the last
// reduction was given: that memory is free for the next gather, which has as long as forward gives
// one.
void Schedule::Halfway(Unit& unit) {
  const int64_t half = unit.group->half_of_grads();
  if (half == 0 || unit.backward.arrived_numel < half) return;
  if (std::exchange(unit.backward.is_halfway, true)) return;
  reductions_.ReleaseInputs();
  gathers_.Halfway(unit);
}

// Frees the units that backward has gone past: frozen and detached parameters may be needed for the
// gradients of the inputs alone, and parts of a forward that are computed again, for their
// gradients. Of the nodes that can run autograd takes those of a device in the order of falling
// sequence numbers, and a node's inputs have lower ones: so at a node from before the unit's
// forward no node of it is left. A graph task within another one has a higher number, and is over
// when the other goes on. Where nodes of hidden graphs lie is not known.
void Schedule::FreePassed() {
  if (begun_.empty() || uses_hidden_graph_) return;
  const auto node = torch::autograd::get_current_node();
  if (node == nullptr) return;
  const int graph_task = torch::autograd::get_current_graph_task_id();
  std::erase_if(begun_, [&](const UnitPtr& unit) {
    const bool same_task = graph_task == unit->backward.graph_task;
    const bool passed = same_task ? node->sequence_nr() < unit->backward.first_node
                                  : graph_task < unit->backward.graph_task;
    const bool complete = unit->backward.complete || !unit->trains();
    if (!passed || !complete || node->device() != unit->group->device()) return false;
    FreeAfterBackward(*unit);
    return true;
  });
}

void Schedule::FreeAfterBackward(Unit& unit) {
  if (!FreesAfterBackward(unit)) return;
  unit.unsharded_by_user = false;
  unit.group->Reshard();
}

bool Schedule::FreesAfterBackward(const Unit& unit) const {
  return unit.reshard_after_backward && !has_hidden_graph_ && !IsRunning(unit);
}

bool Schedule::IsRunning(const Unit& unit) const {
  return std::any_of(active_.begin(), active_.end(),
                     [&](const Call& call) { return call.unit.get() == &unit; });
}

// -- A backward ends

void Schedule::EndBackward() {
  has_hidden_graph_ = has_hidden_graph_ && keeps_graph_;  // what a part of this one made is used
  reductions_.AllReady();
  FinishGathers();
  reductions_.StartReady();
  StartUnqueued();
  reductions_.Take(last_backward_ ? 0 : reductions_.in_flight());
  for (const UnitPtr& unit : units_) {
    if (FreesAfterBackward(*unit)) Release(unit);
    if (last_backward_ && unit->trains()) unit->group->reducer().Join();
    // Of a unit that was not used as a whole, too.
    const bool may_have_some = Contains(participants_, unit) || unit->backward.arrivals > 0;
    if (Keeps(*unit) && may_have_some) unit->group->KeepGrads();
  }
  AwaitReads();
  NoteOwing();
  gathers_.Clear();
  begun_.clear();
  phase_ = phase_ == Phase::kBackwardInForward ? Phase::kForward : Phase::kBackwardDone;
  on_backward_end_();
  for (const Call& call : active_) call.unit->on_backward();
  // Whoever gets the turn next takes errors too: this backward's has to be taken before.
  const auto give_turn = c10::make_scope_exit([this] { turn_->EndBackward(); });
  reductions_.RethrowKept();
}

// Of an older graph than the last forward's: units that no queue expects, and of which some
// parameters had no gradient in it. Those that got all of theirs have been reduced at once.
void Schedule::StartUnqueued() {
  for (const UnitPtr& unit : units_) {
    if (!Reduces(*unit) || unit->backward.arrivals == 0) continue;
    const bool is_queued = Contains(participants_, unit) || Contains(owing_, unit);
    if (!is_queued) reductions_.GradientsComplete(unit);
  }
}

// Starts the gathers that this rank had no use for: peers may wait for them before they can join a
// reduction. Two at a time, since each holds a whole unit; the older one is over when the peers
// have come to it too.
void Schedule::FinishGathers() {
  for (UnitPtr last; !gathers_.empty();) {
    const UnitPtr older = std::exchange(last, gathers_.next());
    gathers_.StartNext();
    if (!older || !FreesAfterBackward(*older)) continue;
    // On their way there the peers reduce, and need this rank for that. Only afterwards may this
    // rank wait for a reduction.
    StartReductionsBefore(*older, reductions_.in_flight());
    Release(older);
    StartReductionsBefore(*older, SIZE_MAX);
  }
}

// Starts the reductions that come before that of `unit`, until `limit` are in flight. A unit that
// owes one comes behind all that took part in forward.
void Schedule::StartReductionsBefore(const Unit& unit, size_t limit) {
  const auto place = [this](const Unit& wanted) {
    const auto at =
        std::find_if(participants_.rbegin(), participants_.rend(),
                     [&](const UnitPtr& participant) { return participant.get() == &wanted; });
    return at - participants_.rbegin();
  };
  reductions_.StartWhile([&](const Unit& next) { return place(next) < place(unit); }, limit);
}

void Schedule::FinalizeBackward(bool wait) {
  const ReadTurn turn = turn_->BeginRead();
  const auto give_back = c10::make_scope_exit([&] {
    if (turn == ReadTurn::kTaken) turn_->EndRead();
  });
  if (in_backward()) Reset();  // it has raised
  MeetAfterError(Meeting::kBackward);
  UnitSequence kept;
  for (const UnitPtr& unit : owing_) {
    if (Reduces(*unit)) kept.push_back(unit);
  }
  reductions_.Begin(kept);
  reductions_.AllReady();
  reductions_.StartReady();
  reductions_.Take(wait ? 0 : reductions_.in_flight());
  for (const UnitPtr& unit : units_) {
    if (FreesAfterBackward(*unit)) Release(unit);
  }
  if (wait) JoinReductions();
  NoteOwing();
  on_backward_end_();
  reductions_.RethrowKept();
}

// What was not reduced has to be, by a later backward and perhaps of units that it does not run.
void Schedule::NoteOwing() {
  for (const UnitPtr& unit : participants_) {
    if (!Contains(owing_, unit)) owing_.push_back(unit);
  }
  std::erase_if(owing_, [this](const UnitPtr& unit) {
    const bool reduced = Reduces(*unit) && !unit->group->reducer().has_partial();
    return !unit->trains() || reduced;
  });
}

}  // namespace hsdp_ckpt::hsdp
