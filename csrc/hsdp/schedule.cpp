// The forward's side of the schedule, and what is between steps. schedule_backward.cpp has the
// backward's.
#include "hsdp/schedule.h"

#include <ATen/SequenceNumber.h>
#include <c10/util/ScopeExit.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <utility>

#include "hsdp/outside_of_transforms.h"
#include "hsdp/unit_errors.h"

namespace hsdp_ckpt::hsdp {
namespace {

// Whether autograd runs in this thread: a forward now is a recomputation.
bool AutogradRuns() { return torch::autograd::get_current_graph_task_id() != -1; }

}  // namespace

Schedule::Schedule(BackwardPrefetch backward_prefetch, int64_t rank, std::shared_ptr<Peers> peers,
                   std::function<void()> on_backward_end)
    : rank_(rank),
      peers_(std::move(peers)),
      on_backward_end_(std::move(on_backward_end)),
      turn_(std::make_shared<Turn>(
          [this] { return c10::str("rank ", rank_, ": module ", units_[0]->name(), ": "); })),
      order_(units_, peers_, rank),
      gathers_(backward_prefetch, rank),
      reductions_(gathers_, rank) {}

void Schedule::Add(const UnitPtr& unit, std::vector<FullParam> full,
                   std::vector<size_t> trainable) {
  if (!Contains(units_, unit)) units_.push_back(unit);
  const bool backward_has_raised = in_backward() && !AutogradRuns();
  const bool frozen = trainable.size() < full.size();
  if (backward_has_raised) unit->group->DropGrads();
  unit->group->BindFull(
      std::move(full), std::move(trainable),
      [weak = weak_from_this(), weak_unit = std::weak_ptr<Unit>(unit)](size_t slot) {
        const auto self = weak.lock();
        const auto alive = weak_unit.lock();
        if (!self || !alive) return;
        const OutsideOfTransforms outside;
        self->GradArrived(alive, slot);
      });
  unit->frozen = frozen;
  order_.ForgetPassed();
  // A recomputation binds anew what was frozen or unfrozen since its forward: other gradients come.
  unit->backward.Begin(unit->group->trainable().size());
}

// Calls BeforeBackward when the gradient of `output` is computed, if both still live.
void Schedule::AnnounceBackward(const at::Tensor& output, const UnitPtr& unit) {
  output.register_hook([weak = weak_from_this(), weak_unit = std::weak_ptr<Unit>(unit),
                        first_node = unit->first_node](const at::Tensor&) {
    const auto self = weak.lock();
    const auto alive = weak_unit.lock();
    if (!alive) return;
    TORCH_CHECK(self, "module ", alive->name(),
                ": since this forward it has been used within another outermost module, and "
                "this backward has lost its parameters: run forward and backward of one "
                "before the other's forward");
    const OutsideOfTransforms outside;
    self->BeforeBackward(alive, first_node);
  });
}

void Schedule::EnterForward(const UnitPtr& unit, bool grad_enabled) {
  const uint64_t next_node = at::sequence_number::peek();
  if (AutogradRuns()) {
    // Activation checkpointing computes the forward again: no new pass, nothing to record.
    if (grad_enabled) unit->first_node = std::min(unit->first_node, next_node);
    UnshardInBackward(unit);
    return;
  }
  turn_->BeginForward();
  if (active_.empty()) BeginForward(unit);
  auto unless_gathered = c10::make_scope_exit([this] { may_be_missed_ = true; });
  active_.push_back({unit, grad_enabled});
  order_.Follow(unit);
  GatherAnew(*unit);
  PrefetchForward(*unit);
  unless_gathered.release();
  Naming({rank_, unit->name()}, "all-gather", [&] { unit->group->Unshard(); });
  if (!grad_enabled) return;
  CountForBackward(unit);
  unit->first_node = std::min(unit->first_node, next_node);
}

// A unit whose outputs may have gradients. A forward without gradients changes nothing for the
// graphs of those before it, which more backwards may be to use.
void Schedule::CountForBackward(const UnitPtr& unit) {
  if (phase_ == Phase::kBackwardDone) {
    participants_.clear();
    phase_ = Phase::kForward;
  }
  may_be_missed_ = true;
  if (!unit->sync && unit->trains()) unit->group->ExpectKeptGrads();
  if (Contains(participants_, unit)) return;
  unit->idle_in_backward = !unit->trains();
  participants_.push_back(unit);
}

void Schedule::BeginForward(const UnitPtr& outermost) {
  ForgetLastPass();
  MeetAfterError(Meeting::kForward);
  if (phase_ == Phase::kBackwardDone) {
    for (const UnitPtr& unit : units_) unit->first_node = UINT64_MAX;
  }
  may_be_missed_ = false;
  order_.Begin(outermost);
}

// What an earlier pass left behind (the root's parameters, a gather nobody used, a backward that
// raised) may be older than the shards are now.
void Schedule::ForgetLastPass() {
  if (in_backward()) return Reset();
  for (const UnitPtr& unit : units_) {
    const bool kept = unit->unsharded_by_user || !unit->reshard_after_backward;
    if (kept) continue;
    if (has_hidden_graph_) {
      Outdate(*unit);
    } else {
      unit->group->Reshard();
    }
  }
}

// A graph needs the full parameters as they are.
void Schedule::Outdate(Unit& unit) {
  unit.outdated = unit.group->state() != ParamGroup::State::kSharded;
  unit.unsharded_by_user = false;
}

// A forward uses the shards as they are now.
void Schedule::GatherAnew(Unit& unit) {
  const bool is_outdated = std::exchange(unit.outdated, false);
  if (is_outdated || unit.group->is_resharded_to_fewer()) unit.group->Reshard();
  Naming({rank_, unit.name()}, "all-gather", [&] { unit.group->StartGather(); });
}

void Schedule::PrefetchForward(const Unit& unit) {
  const auto prefetch = [this](Unit& next) {
    // An outdated one may not come, and what it was kept for would lack it.
    if (!next.outdated) GatherAnew(next);
  };
  for (const auto& weak : unit.forward_prefetch) {
    if (const UnitPtr next = weak.lock()) prefetch(*next);
  }
  if (!unit.forward_prefetch.empty()) return;
  if (const UnitPtr next = order_.Next()) prefetch(*next);
}

void Schedule::LeaveForward(const UnitPtr& unit, const std::vector<at::Tensor>& outputs) {
  for (const at::Tensor& output : outputs) {
    if (output.requires_grad()) AnnounceBackward(output, unit);
  }
  if (AutogradRuns()) return;
  NoteFrozen(unit, outputs);
  const Call call = std::move(active_.back());
  active_.pop_back();
  if (FreesAfterForward(*unit, call, order_.EndsWith(unit))) {
    unit->unsharded_by_user = unit->outdated = false;
    if (call.grad_enabled) {
      unit->group->ReshardAfterForward();
    } else {
      unit->group->Reshard();
    }
  }
  if (!active_.empty()) return;
  TORCH_CHECK(!in_backward(), "rank ", rank_, ": module ", unit->name(),
              ": a backward within this forward has raised, and its error was caught there. What "
              "it has left can't be told from a backward that goes on: let the error out of the "
              "forward");
  EndForward();
  if (!call.grad_enabled) AwaitReads();  // else backward does
  turn_->EndForward();
}

// A frozen unit through which no rank's gradients pass takes no part in backward: none of its calls
// of this pass may have needed it.
void Schedule::NoteFrozen(const UnitPtr& unit, const std::vector<at::Tensor>& outputs) {
  if (unit->trains() || !active_.back().grad_enabled) return;
  const bool passed = has_hidden_graph_ ||
                      std::any_of(outputs.begin(), outputs.end(),
                                  [](const at::Tensor& output) { return output.requires_grad(); });
  if (order_.IsPassedInBackward(unit, passed)) unit->idle_in_backward = false;
}

bool Schedule::FreesAfterForward(const Unit& unit, const Call& call, bool was_last) const {
  // What a graph of gradients needs stays, whoever runs it meanwhile.
  if (has_hidden_graph_) return false;
  if (!call.grad_enabled) return true;
  switch (unit.reshard_after_forward) {
    case ReshardAfterForward::kAlways:
      return true;
    case ReshardAfterForward::kNever:
      return false;
    case ReshardAfterForward::kUnlessBackwardIsNext:
      // Backward needs the outermost unit first, and the one that ran last: freeing them would only
      // mean another gather.
      return !active_.empty() && !was_last;
  }
  return true;
}

void Schedule::EndForward() {
  order_.CheckEnd();
  for (const UnitPtr& unit : units_) {
    const bool unused = unit->group->state() == ParamGroup::State::kGathering;
    if (unused && !unit->unsharded_by_user) Release(unit);
  }
  order_.Keep();
}

void Schedule::AbortForward(const UnitPtr& unit) {
  if (AutogradRuns()) return;
  const auto at = std::find_if(active_.rbegin(), active_.rend(),
                               [&](const Call& call) { return call.unit == unit; });
  if (at != active_.rend()) active_.erase(at.base() - 1, active_.end());
  const auto end = c10::make_scope_exit([this] {
    if (active_.empty()) turn_->EndForward();
  });
  // Peers are told before this rank waits for anything. They have no need of it where nothing is
  // gathered, or all has been and no backward is to come.
  const bool is_missed = may_be_missed_ || !order_.IsComplete();
  if (active_.empty() && is_missed && GathersAnything()) LeaveStep("forward");
  order_.LoseTrack();
  ReleaseAfterError(unit);
  if (!active_.empty()) return;
  for (const UnitPtr& other : units_) ReleaseAfterError(other);
}

void Schedule::ReleaseAfterError(const UnitPtr& unit) {
  try {
    Release(unit);
  } catch (const std::exception&) {
    // The error that ended the forward is the one to hear of. With a gather's failed works
    // forgotten this one frees.
    Release(unit);
  }
}

void Schedule::StartUnshard(const UnitPtr& unit) {
  if (active_.empty() && !AutogradRuns()) {
    if (in_backward()) Reset();  // it has raised
    MeetAfterError(Meeting::kForward);
  }
  unit->unsharded_by_user = true;
  GatherAnew(*unit);
}

void Schedule::Unshard(const UnitPtr& unit) {
  StartUnshard(unit);
  Naming({rank_, unit->name()}, "all-gather", [&] { unit->group->Unshard(); });
}

void Schedule::Release(const UnitPtr& unit) {
  unit->unsharded_by_user = unit->outdated = false;
  unit->group->Reshard();
}

void Schedule::FinishReductions() {
  reductions_.Take(0);
  JoinReductions();
  reductions_.RethrowKept();
}

void Schedule::JoinReductions() {
  for (const UnitPtr& unit : units_) {
    if (unit->trains()) unit->group->reducer().Join();
  }
}

// The host is about to change shards that are its own, an optimizer say.
void Schedule::AwaitReads() {
  for (const UnitPtr& unit : units_) unit->group->AwaitReads();
}

ReadTurn Schedule::BeginRead() { return FinishFor(turn_->BeginRead()); }

ReadTurn Schedule::BeginReadIfQuiet() { return FinishFor(turn_->BeginReadIfQuiet()); }

ReadTurn Schedule::FinishFor(ReadTurn turn) {
  if (turn != ReadTurn::kTaken) return turn;
  auto give_back = c10::make_scope_exit([this] { turn_->EndRead(); });
  // A backward that raised has left what only the next forward or Reset can drop.
  if (!in_backward()) FinishReductions();
  give_back.release();
  return turn;
}

void Schedule::Reset() {
  // Another thread is waited for; at the beginning of a forward the turn is this one's already.
  const ReadTurn turn = turn_->BeginRead();
  const auto give_back = c10::make_scope_exit([&] {
    if (turn == ReadTurn::kTaken) turn_->EndRead();
  });
  const bool backward_has_raised = in_backward();
  if (backward_has_raised && !HasSentAll()) LeaveStep("backward");
  std::exception_ptr late;
  try {
    if (!backward_has_raised) FinishReductions();
  } catch (const c10::DistBackendError&) {
    if (!has_told_error()) late = std::current_exception();
  } catch (...) {
    late = std::current_exception();
  }
  for (const UnitPtr& unit : units_) {
    // All units: one whose result could not be taken has left the queue already.
    if (unit->trains()) DropReduction(*unit);
    if (backward_has_raised) unit->group->DropGrads();
    if (backward_has_raised) {
      ReleaseAfterError(unit);
    } else if (has_hidden_graph_) {
      Outdate(*unit);
    } else {
      Release(unit);
    }
  }
  AwaitReads();
  gathers_.Clear();
  reductions_.Clear();
  active_.clear();
  begun_.clear();
  if (backward_has_raised) {
    NoteOwing();  // peers may keep gradients of that backward
    has_hidden_graph_ = false;
    phase_ = Phase::kBackwardDone;
  }
  if (late) std::rethrow_exception(late);
}

}  // namespace hsdp_ckpt::hsdp
