#include "hsdp/departures.h"

#include <c10/util/Exception.h>

#include <sstream>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace hsdp_ckpt::hsdp {
namespace {

// A tag is an int: its low half tells roots apart, what is left of the high half rounds.
constexpr int64_t kChannels = 1 << 16, kRounds = 1 << 13;

/// One rank's departure as it stands in the store: how far it has come, and why it has left.
struct Departure {
  Departures::Counts counts;
  std::string why;

  std::string ToText() const {
    return c10::str(counts[0], " ", counts[1], " ", counts[2], " ", why);
  }
  static Departure Of(const std::string& text) {
    Departure departure{};
    std::istringstream from(text);
    for (int64_t& count : departure.counts) from >> count;
    from.get();
    std::getline(from, departure.why, '\0');
    return departure;
  }
};

}  // namespace

std::string Departures::Key(int64_t round) const {
  return c10::str("departures/", channel_, "/", round);
}

c10::intrusive_ptr<c10d::Store> Departures::store() const {
  return c10d::resolve_process_group(group_)->getStore();
}

int64_t Departures::tag() const {
  return kFirstTag + round_ % kRounds * kChannels + channel_ % kChannels;
}

JointOp Departures::Begin(Joint kind) {
  return {kind, ++begun_.at(static_cast<size_t>(kind)), round_};
}

Departures::Counts Departures::counts() const {
  Counts counts;
  for (size_t kind = 0; kind < counts.size(); ++kind) counts.at(kind) = begun_.at(kind);
  return counts;
}

// Nobody waits for an answer here: an error, or Ctrl-C, is on its way up. Without its store, which
// is gone with the group or the process that holds it, a rank can tell nothing; peers see
// connections close then.
void Departures::Leave(const std::string& why) {
  if (left_.exchange(true)) return;
  try {
    const auto told = store();
    const std::string key = Key(round_);
    const int64_t place = told->add(key, 1);
    told->set(c10::str(key, "/", place), Departure{counts(), why}.ToText());
  } catch (const std::exception&) {
  }
}

std::string Departures::WhyInVain(const JointOp& op) const {
  try {
    const auto told = store();
    for (int64_t place = 1;; ++place) {
      const std::string key = c10::str(Key(op.round), "/", place);
      if (!told->check({key})) return {};
      const Departure departure = Departure::Of(told->get_to_str(key));
      if (departure.counts.at(static_cast<size_t>(op.kind)) < op.number) return departure.why;
    }
  } catch (const std::exception&) {
    return {};  // see Leave
  }
}

void Departures::GoOn(const Counts& counts) {
  for (size_t kind = 0; kind < counts.size(); ++kind) begun_.at(kind) = counts.at(kind);
  left_ = false;
}

}  // namespace hsdp_ckpt::hsdp
