// How a rank leaves a step that has had an error, and how all of them go on.
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "hsdp/schedule.h"

namespace hsdp_ckpt::hsdp {
namespace {

// The words that a rank tells the others when they meet: what it is about to begin, what its last
// passes were, how far it has come, and which of these hold for each unit.
constexpr int64_t kOwes = 1, kExpectsKept = 2, kTakesPart = 4;

constexpr size_t kPassesAt = 1, kCountsAt = 2;
constexpr size_t kUnitsAt = kCountsAt + std::tuple_size_v<Departures::Counts>;

}  // namespace

// Without peers there is nobody to tell.
void Schedule::LeaveStep(const char* what) {
  if (!peers_) return;
  peers_->departures()->Leave(c10::str("rank ", rank_, " has left the ", what, " of module ",
                                       units_[0]->name(), " with an error of its own"));
}

// Whoever has left a step begins nothing before all ranks have. Those that had no error of their
// own come here when they have waited in vain for what this rank has not begun.
void Schedule::MeetAfterError(Meeting meeting) {
  if (!peers_ || !peers_->departures()->left()) return;
  EndReductions();
  if (meeting == Meeting::kForward) ForgetStep();
  const std::vector<int64_t> words = StateWords(meeting);
  peers_->departures()->EnterRound();
  std::vector<std::vector<int64_t>> all;
  try {
    all = peers_->Exchange(words);
  } catch (const std::exception& error) {
    TORCH_CHECK_WITH(DistBackendError, false, "rank ", rank_, ": module ", units_[0]->name(),
                     ": an earlier step has ended with an error here, and some ranks have neither "
                     "had one nor waited for this rank within the group's timeout. Let all ranks "
                     "leave the step, or end the job. ",
                     error.what());
  }
  CheckMeeting(all);
  GoOnFrom(all);
}

// What the step has left differs between the ranks.
void Schedule::ForgetStep() {
  for (const UnitPtr& unit : units_) {
    ReleaseAfterError(unit);
    unit->first_node = UINT64_MAX;
  }
  gathers_.Clear();
  participants_.clear();
  begun_.clear();
  has_hidden_graph_ = false;
  phase_ = Phase::kForward;
}

std::vector<int64_t> Schedule::StateWords(Meeting meeting) const {
  std::vector<int64_t> words{static_cast<int64_t>(meeting), order_.PassesDigest()};
  for (const int64_t count : peers_->departures()->counts()) words.push_back(count);
  for (const UnitPtr& unit : units_) {
    words.push_back((Contains(owing_, unit) ? kOwes : 0) |
                    (unit->group->expects_kept_grads() ? kExpectsKept : 0) |
                    (Contains(participants_, unit) ? kTakesPart : 0));
  }
  return words;
}

// A forward that all ranks have left on purpose may have a backward; of the same units then.
void Schedule::CheckMeeting(const std::vector<std::vector<int64_t>>& all) const {
  std::vector<std::vector<int64_t>> begun;
  for (const auto& words : all) {
    const bool forward = words[0] == static_cast<int64_t>(Meeting::kForward);
    const auto takes_part = [](int64_t state) { return (state & kTakesPart) != 0; };
    begun.push_back(
        {words[0], forward ? 0 : std::count_if(words.begin() + kUnitsAt, words.end(), takes_part)});
  }
  const std::string differing = peers_->Differing(begun, [](const std::vector<int64_t>& words) {
    return words[0] == static_cast<int64_t>(Meeting::kForward)
               ? std::string("a forward")
               : c10::str("a backward of ", words[1], " wrapped modules");
  });
  TORCH_CHECK(differing.empty(),
              "after an error in an earlier step the ranks go on with different "
              "things (this is rank ",
              rank_, "):", differing);
}

// What decides on what the ranks send each other is made equal: which units owe a reduction, in
// what dtype, and what they expect forward to call.
void Schedule::GoOnFrom(const std::vector<std::vector<int64_t>>& all) {
  Departures::Counts counts{};
  std::vector<int64_t> some(units_.size(), 0);
  for (const auto& words : all) {
    for (size_t kind = 0; kind < counts.size(); ++kind)
      counts.at(kind) = std::max(counts.at(kind), words[kCountsAt + kind]);
    for (size_t i = 0; i < units_.size(); ++i) {
      some[i] |= words[kUnitsAt + i];
    }
  }
  owing_.clear();
  for (size_t i = 0; i < units_.size(); ++i) {
    if (some[i] & kOwes) owing_.push_back(units_[i]);
    if (some[i] & kExpectsKept) units_[i]->group->ExpectKeptGrads();
  }
  const bool alike = std::all_of(all.begin(), all.end(), [&](const auto& words) {
    return words[kPassesAt] == all[0][kPassesAt];
  });
  if (!alike) order_.Forget();
  ++counts.at(static_cast<size_t>(Joint::kQuestion));  // the one that has brought these words
  peers_->departures()->GoOn(counts);
}

// Whether peers can end a backward that has raised here without this rank, and know no more of it.
bool Schedule::HasSentAll() const {
  const bool kept =
      std::any_of(participants_.begin(), participants_.end(), [&](const UnitPtr& unit) {
        return unit->trains() && (!Reduces(*unit) || unit->group->reducer().has_partial());
      });
  return gathers_.empty() && reductions_.all_started() && !kept;
}

bool Schedule::GathersAnything() const {
  return std::any_of(units_.begin(), units_.end(),
                     [](const UnitPtr& unit) { return unit->group->shards() > 1; });
}

// Takes the reductions under way. Those that are given up are dropped; their error is this step's
// if none has been raised yet.
void Schedule::EndReductions() {
  std::exception_ptr given_up;
  try {
    FinishReductions();
  } catch (const c10::DistBackendError&) {
    given_up = std::current_exception();
  }
  for (const UnitPtr& unit : units_) {
    if (unit->trains()) DropReduction(*unit);
  }
  reductions_.Clear();
  if (given_up && !has_told_error()) std::rethrow_exception(given_up);
}

void Schedule::DropReduction(Unit& unit) {
  try {
    unit.group->reducer().Drop();
  } catch (const c10::DistBackendError&) {
    if (!peers_ || !peers_->departures()->left()) throw;
    unit.group->reducer().Drop();  // peers have left it too: what is left is to forget it
  }
}

}  // namespace hsdp_ckpt::hsdp
