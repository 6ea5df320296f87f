#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <utility>
#include <vector>

namespace hsdp_ckpt::hsdp {

/// What all ranks of a root do together, each kind in one order: gathers, reductions, and questions
/// that they ask each other (Peers).
enum class Joint : uint8_t { kGather, kReduction, kQuestion };

/// One of them: the `number`th of its kind that this rank has begun.
struct JointOp {
  Joint kind;
  int64_t number;
  int64_t round;  ///< see Departures
};

/// What the ranks of one root tell each other, past their collectives, of forwards and backwards
/// that an error has ended. Who has left one begins nothing more in it, and peers that wait for
/// that would do so for ever.
///
/// Such errors are counted in rounds. Who has one says at once how far it has come, in the group's
/// store, of all roots of these ranks: a step may use several. Peers that have waited for more than
/// a moment look there (PendingWorks): if what they wait for is beyond that point they leave the
/// step too, with an error that names the first one. What all ranks have begun is never given up.
/// They meet again at their next forward (Schedule), and the next round begins, whose messages have
/// another tag: none is taken for one that the last round has left behind.
///
/// In a step without an error nothing is written or read. Ownership: none, the group is looked up
/// by name at every call. Thread safety: all of it but EnterRound and GoOn, which are the
/// schedule's to call.
class Departures {
 public:
  /// How many of each kind have been begun.
  using Counts = std::array<int64_t, 3>;

  /// `group`: the name of a group of all ranks, whose store they have in common. `channel`: of this
  /// root; the same on all ranks, another one for every other root.
  static std::shared_ptr<Departures> Make(std::string group, int64_t channel);

  /// Begins one of `kind`.
  JointOp Begin(Joint kind);
  /// This rank leaves the round, in which an error is raised here; `why` names it. Those who have
  /// left before keep to what they have said then.
  void Leave(const std::string& why);
  /// The same, for a wait in vain whose error may have nobody to be raised to yet.
  void Follow(const std::string& why);
  bool left() const { return left_; }
  /// Whether the error that ended the round has been raised here.
  bool has_raised() const { return has_raised_; }
  /// Why somebody has left who has not begun `op`; empty if there is nobody.
  std::string WhyInVain(const JointOp& op) const;

  /// The next round begins, for what the ranks have to say to each other before they go on.
  void EnterRound() { ++round_; }
  /// All ranks have met in it and go on, from the same counts. Nobody looks at the last one again.
  void GoOn(const Counts& counts);
  Counts counts() const;

  /// Numbers what is sent point to point in a round.
  int64_t tag(int64_t round) const;
  /// Above what a user's own messages in a mesh's group may have.
  static constexpr int64_t kFirstTag = 0x2000'0000;

 private:
  Departures(std::string group, int64_t channel) : group_(std::move(group)), channel_(channel) {}

  void LeaveAlone(const std::string& why);
  std::string Key(int64_t round) const;
  c10::intrusive_ptr<c10d::Store> store() const;

  const std::string group_;
  const int64_t channel_;
  std::array<std::atomic<int64_t>, 3> begun_{};
  std::atomic<int64_t> round_ = 0;
  std::atomic<bool> left_ = false, has_raised_ = false;
  std::string said_at_;  // the key of what this rank has said of its departure
};

}  // namespace hsdp_ckpt::hsdp
