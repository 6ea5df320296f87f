#include "hsdp/forward_order.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <vector>

namespace hsdp_ckpt::hsdp {
namespace {

constexpr const char* kRule = "All ranks must run the same wrapped modules in the same order";
constexpr int64_t kEndOfForward = -1;  // instead of a unit's index

}  // namespace

const UnitSequence& ForwardOrder::LastPass() const {
  static const UnitSequence none;
  const auto pass = last_passes_.find(outermost_);
  return pass == last_passes_.end() ? none : pass->second;
}

void ForwardOrder::Begin(const UnitPtr& outermost) {
  calls_.clear();
  position_ = 0;
  on_track_ = true;
  has_raised_ = false;
  // A peer may be about to repeat its last pass, which this one differs from. A pass never seen is
  // asked about call by call.
  const auto known = last_passes_.find(outermost.get());
  const bool seen = known != last_passes_.end() && !known->second.empty();
  if (outermost_ != outermost.get() && seen) Agree(outermost.get());
  outermost_ = outermost.get();
}

void ForwardOrder::Forget() {
  last_passes_.clear();
  passed_.clear();
  outermost_ = nullptr;
}

int64_t ForwardOrder::PassesDigest() const {
  constexpr uint64_t kPrime = 1099511628211;  // FNV-1a's, over the units' numbers
  uint64_t digest = 0;                        // a sum, as the passes are in the order of addresses
  for (const auto& [outermost, calls] : last_passes_) {
    uint64_t pass = 14695981039346656037U;
    const auto add = [&](const Unit* unit) {
      pass = (pass ^ static_cast<uint64_t>(IndexOf(unit))) * kPrime;
    };
    add(outermost);
    if (outermost == outermost_) add(nullptr);
    for (const UnitPtr& unit : calls) add(unit.get());
    digest += pass;
  }
  return static_cast<int64_t>(digest);
}

void ForwardOrder::Follow(const UnitPtr& unit) {
  if (Next() == unit) {
    ++position_;
  } else {
    Agree(unit.get());
    on_track_ = false;
    // Some calls were left out: from here on the last pass is a guide again.
    const UnitSequence& pass = LastPass();
    const auto expected = pass.begin() + static_cast<std::ptrdiff_t>(position_);
    const auto later = std::find(expected, pass.end(), unit);
    if (later != pass.end()) position_ = static_cast<size_t>(later - pass.begin()) + 1;
  }
  calls_.push_back(unit);
}

UnitPtr ForwardOrder::Next() const {
  const UnitSequence& pass = LastPass();
  return position_ < pass.size() ? pass[position_] : nullptr;
}

void ForwardOrder::CheckEnd() {
  if (!AtEnd()) Agree(nullptr);
}

void ForwardOrder::Keep() {
  if (!AtEnd()) last_passes_[outermost_] = calls_;
  calls_.clear();
}

// A rank that is alone in leaving the last pass's order waits here, while its peers wait in a
// gather that it never joins: all of them fail within the groups' timeouts, and none has taken part
// in another one's collective.
void ForwardOrder::Agree(const Unit* unit) const { Ask(unit, false); }

bool ForwardOrder::IsPassedInBackward(const UnitPtr& unit, bool here) {
  const auto known = passed_.find(unit.get());
  const bool is_news = known == passed_.end() || (here && !known->second.here);
  if (!is_news) return known->second.anywhere;
  bool anywhere = here;
  for (const std::vector<int64_t>& words : Ask(unit.get(), here))
    anywhere = anywhere || words.back() != 0;
  passed_[unit.get()] = {here, anywhere};
  return anywhere;
}

// Everybody's words: a unit, how many have been called, and whether gradients pass through it.
std::vector<std::vector<int64_t>> ForwardOrder::Ask(const Unit* unit, bool is_passed) const {
  if (!peers_) return {};
  const auto call = static_cast<int64_t>(calls_.size());
  const int64_t here = unit == nullptr ? kEndOfForward : IndexOf(unit);
  std::vector<std::vector<int64_t>> all, calls;
  try {
    all = peers_->Exchange({here, call, static_cast<int64_t>(is_passed)});
  } catch (const std::exception& error) {
    const UnitPtr expected = Next();
    TORCH_CHECK(false, "rank ", rank_, " has reached ", NameOf(here), " (wrapped call ", call,
                " of this forward)",
                expected ? ", its last forward ran module " + expected->name() + " here" : "",
                ", and no other rank has come along. ", kRule, ". ", error.what());
  }
  for (const std::vector<int64_t>& words : all) calls.push_back({words[0], words[1]});
  const std::string differing = peers_->Differing(calls, [&](const std::vector<int64_t>& words) {
    return NameOf(words[0]) + ", wrapped call " + std::to_string(words[1]) + " of its forward";
  });
  TORCH_CHECK(differing.empty(), "ranks run different wrapped modules (this is rank ", rank_, "). ",
              kRule, ":", differing);
  return all;
}

int64_t ForwardOrder::IndexOf(const Unit* unit) const {
  const auto at = std::find_if(units_.begin(), units_.end(),
                               [&](const UnitPtr& other) { return other.get() == unit; });
  return at - units_.begin();
}

std::string ForwardOrder::NameOf(int64_t index) const {
  return index == kEndOfForward ? "the end of forward"
                                : "module " + units_[static_cast<size_t>(index)]->name();
}

}  // namespace hsdp_ckpt::hsdp
