#include "hsdp/departures.h"

#include <c10/util/Exception.h>

#include <mutex>
#include <sstream>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>

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

/// The departures of all roots of this process.
class Roots {
 public:
  static Roots& OfProcess() {
    static auto& roots = *new Roots();  // threads that are never joined may ask for them
    return roots;
  }

  void Add(const std::shared_ptr<Departures>& one) {
    const std::lock_guard lock(mutex_);
    std::erase_if(all_, [](const auto& weak) { return weak.expired(); });
    all_.push_back(one);
  }

  std::vector<std::shared_ptr<Departures>> Alive() const {
    const std::lock_guard lock(mutex_);
    std::vector<std::shared_ptr<Departures>> alive;
    for (const auto& weak : all_) {
      if (auto one = weak.lock()) alive.push_back(std::move(one));
    }
    return alive;
  }

 private:
  mutable std::mutex mutex_;
  std::vector<std::weak_ptr<Departures>> all_;
};

}  // namespace

std::shared_ptr<Departures> Departures::Make(std::string group, int64_t channel) {
  std::shared_ptr<Departures> made(new Departures(std::move(group), channel));
  Roots::OfProcess().Add(made);
  return made;
}

std::string Departures::Key(int64_t round) const {
  return c10::str("departures/", channel_, "/", round);
}

c10::intrusive_ptr<c10d::Store> Departures::store() const {
  return c10d::resolve_process_group(group_)->getStore();
}

int64_t Departures::tag(int64_t round) const {
  return kFirstTag + round % kRounds * kChannels + channel_ % kChannels;
}

JointOp Departures::Begin(Joint kind) {
  return {kind, ++begun_.at(static_cast<size_t>(kind)), round_};
}

Departures::Counts Departures::counts() const {
  Counts counts;
  for (size_t kind = 0; kind < counts.size(); ++kind) counts.at(kind) = begun_.at(kind);
  return counts;
}

void Departures::Leave(const std::string& why) {
  for (const auto& one : Roots::OfProcess().Alive()) {
    if (one->group_ != group_) continue;
    one->has_raised_ = true;
    one->LeaveAlone(why);
  }
}

void Departures::Follow(const std::string& why) {
  for (const auto& one : Roots::OfProcess().Alive()) {
    if (one->group_ == group_) one->LeaveAlone(why);
  }
}

// Nobody waits for an answer here: an error, or Ctrl-C, is on its way up. Without its store, which
// is gone with the group or the process that holds it, a rank can tell nothing; peers see
// connections close then.
void Departures::LeaveAlone(const std::string& why) {
  if (left_.exchange(true)) return;
  try {
    const auto told = store();
    const std::string key = Key(round_);
    said_at_ = c10::str(key, "/", told->add(key, 1));
    told->set(said_at_, Departure{counts(), why}.ToText());
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
  try {
    const auto told = store();
    const std::string last = Key(round_ - 1);
    if (said_at_ == last + "/1") told->deleteKey(last);
    if (!said_at_.empty()) told->deleteKey(std::exchange(said_at_, {}));
  } catch (const std::exception&) {  // see LeaveAlone
  }
  left_ = has_raised_ = false;
}

}  // namespace hsdp_ckpt::hsdp
