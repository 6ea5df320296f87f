#include "hsdp/schedule.h"

#include <c10/util/ScopeExit.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <utility>

namespace hsdp_ckpt::hsdp {
namespace {

bool InBackward() { return torch::autograd::get_current_graph_task_id() != -1; }

}  // namespace

Schedule::Schedule(BackwardPrefetch backward_prefetch, int64_t rank, std::shared_ptr<Peers> peers,
                   std::function<void()> on_backward_end)
    : backward_prefetch_(backward_prefetch),
      rank_(rank),
      peers_(std::move(peers)),
      on_backward_end_(std::move(on_backward_end)),
      turn_(std::make_shared<Turn>(
          [this] { return c10::str("rank ", rank_, ": module ", units_[0]->name(), ": "); })) {}

void Schedule::Rethrow(const Unit& unit, const char* what) const {
  const auto message = [&](const char* cause) {
    std::string text = "rank " + std::to_string(rank_) + ": the " + what + " of module " +
                       unit.name() + " failed: ";
    if (std::strstr(cause, "Could not resolve the process group") != nullptr) {
      return text +
             "its process group is gone. torch.distributed.destroy_process_group ends what a "
             "wrapped module can do; " +
             "after another init_process_group wrap the module anew";
    }
    return text + cause +
           "\nA peer has died, has raised an error of its own, or does not run this module: see "
           "what the other ranks say";
  };
  try {
    throw;
  } catch (const c10::DistBackendError& error) {
    C10_THROW_ERROR(DistBackendError, message(error.what_without_backtrace()));
  } catch (const c10::Error& error) {
    C10_THROW_ERROR(Error, message(error.what_without_backtrace()));
  } catch (const std::exception& error) {
    C10_THROW_ERROR(DistBackendError, message(error.what()));  // Gloo's own
  }
}

void Schedule::Add(const std::shared_ptr<Unit>& unit, std::vector<at::Tensor> full,
                   std::vector<size_t> trainable) {
  if (!Contains(units_, unit)) units_.push_back(unit);
  if (in_backward_ && !InBackward()) unit->group->DropGrads();  // of one that raised
  const bool frozen = trainable.size() < full.size();
  unit->group->BindFull(
      std::move(full), std::move(trainable),
      [weak = weak_from_this(), weak_unit = std::weak_ptr<Unit>(unit)](size_t slot) {
        const auto self = weak.lock();
        const auto alive = weak_unit.lock();
        if (self && alive) self->GradArrived(alive, slot);
      });
  unit->frozen = frozen;
}

// -- forward

void Schedule::EnterForward(const std::shared_ptr<Unit>& unit, bool grad_enabled,
                            const std::vector<at::Tensor>& inputs) {
  if (InBackward()) {
    // Activation checkpointing computes the forward again: no new pass, nothing to record.
    UnshardForBackward(unit);
    if (unit->inputs == 0)
      WatchInputs(unit, inputs);  // a reentrant one: nothing required gradients the first time
    return;
  }
  turn_->BeginForward();
  if (active_.empty()) BeginForward(unit);
  active_.push_back({unit, grad_enabled});
  Follow(unit);
  GatherAnew(*unit);
  PrefetchForward(*unit);
  Naming(*unit, "all-gather", [&] { unit->group->Unshard(); });
  if (!grad_enabled) return;
  if (!Contains(participants_, unit)) participants_.push_back(unit);
  WatchInputs(unit, inputs);
}

void Schedule::BeginForward(const std::shared_ptr<Unit>& outermost) {
  // What an earlier pass left behind (the root's parameters, a gather nobody used, a backward that
  // raised) may be older than the shards are now.
  if (in_backward_) {
    Reset();
  } else {
    for (const auto& unit : units_) {
      const bool kept = unit->held || !unit->reshard_after_backward;
      unit->outdated =
          differentiates_ && !kept && unit->group->state() != ParamGroup::State::kSharded;
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
  // Another pass than the last one, which a peer may be about to repeat. A pass never seen is asked
  // about call by call.
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
    const auto later =
        std::find(sequence.begin() + static_cast<std::ptrdiff_t>(position_), sequence.end(), unit);
    if (later != sequence.end()) position_ = static_cast<size_t>(later - sequence.begin()) + 1;
  }
  recorded_.push_back(unit);
}

void Schedule::GatherAnew(Unit& unit) {
  if (std::exchange(unit.outdated, false)) unit.group->Reshard();
  Naming(unit, "all-gather", [&] { unit.group->StartGather(); });
}

void Schedule::PrefetchForward(const Unit& unit) {
  const auto prefetch = [this](Unit& next) {
    if (!next.outdated)
      GatherAnew(next);  // it may not come, and what it was kept for would lack it
  };
  for (const auto& weak : unit.forward_prefetch) {
    if (const auto next = weak.lock()) prefetch(*next);
  }
  const Sequence& sequence = sequences_[outermost_];
  if (!unit.forward_prefetch.empty() || position_ >= sequence.size()) return;
  prefetch(*sequence[position_]);
}

void Schedule::LeaveForward(const std::shared_ptr<Unit>& unit,
                            const std::vector<at::Tensor>& outputs) {
  for (const at::Tensor& output : outputs) {
    if (!output.requires_grad()) continue;
    output.register_hook(
        [weak = weak_from_this(), weak_unit = std::weak_ptr<Unit>(unit)](const at::Tensor&) {
          const auto self = weak.lock();
          const auto alive = weak_unit.lock();
          if (self && alive) self->BeforeBackward(alive);
        });
  }
  if (InBackward()) return;
  const bool grad_enabled = active_.back().grad_enabled;
  active_.pop_back();
  // The outermost unit is needed first in backward, and so is the one that ran last: freeing them
  // would only mean another gather.
  const bool last =
      on_track_ && position_ == sequences_[outermost_].size() && recorded_.back() == unit;
  // What a graph of gradients needs stays, whoever runs it meanwhile.
  const bool keep =
      differentiates_ ||
      (grad_enabled && !unit->reshard_after_forward.value_or(!active_.empty() && !last));
  if (!keep) Release(unit);
  if (!active_.empty()) return;
  TORCH_CHECK(!in_backward_, "rank ", rank_, ": module ", unit->name(),
              ": a backward within this forward has raised, and its error was caught there. What "
              "it has left can't be told "
              "from a backward that goes on: let the error out of the forward");
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
  const auto at = std::find_if(active_.rbegin(), active_.rend(),
                               [&](const Call& call) { return call.unit == unit; });
  if (at != active_.rend()) active_.erase(at.base() - 1, active_.end());
  on_track_ = false;
  const auto release = [&](const std::shared_ptr<Unit>& freed) {
    try {
      Release(freed);
    } catch (const std::exception&) {
      // The error that ended the forward is the one to hear of. With a gather's failed works
      // forgotten this one frees.
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
  GatherAnew(*unit);
  if (wait) Naming(*unit, "all-gather", [&] { unit->group->Unshard(); });
}

void Schedule::Release(const std::shared_ptr<Unit>& unit) {
  unit->held = unit->outdated = false;
  unit->group->Reshard();
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
  if (!in_backward_)
    FinishReductions();  // one that raised has left what only the next forward or Reset can drop
  give_back.release();
  return true;
}

void Schedule::Reset() {
  const bool waited =
      turn_->BeginRead()
          .value();  // for another thread; at the begin of a forward it is this one's already
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

}  // namespace hsdp_ckpt::hsdp
