#pragma once

#include <array>
#include <atomic>
#include <cstdint>
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
/// store. Peers that have waited for more than a moment look there (PendingWorks): if what they
/// wait for is beyond that point they leave the step too, with an error that names the first one.
/// What all have begun is never given up, so whether a rank goes on does not depend on who is
/// faster. All ranks meet again at their next forward (Schedule), and the next round begins, whose
/// messages have another tag: none is taken for one that the last round has left behind.
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
  Departures(std::string group, int64_t channel) : group_(std::move(group)), channel_(channel) {}

  /// Begins one of `kind`.
  JointOp Begin(Joint kind);
  /// This rank leaves the round; `why` names the error that was the first. No effect if it has left
  /// it before.
  void Leave(const std::string& why);
  bool left() const { return left_; }
  /// Why somebody has left who has not begun `op`; empty if there is nobody.
  std::string WhyInVain(const JointOp& op) const;

  /// The next round begins, for what the ranks have to say to each other before they go on.
  void EnterRound() { ++round_; }
  /// All ranks have met in it and go on, from the same counts.
  void GoOn(const Counts& counts);
  Counts counts() const;

  /// Numbers what is sent point to point in this round.
  int64_t tag() const;
  /// Above what a user's own messages in a mesh's group may have.
  static constexpr int64_t kFirstTag = 0x2000'0000;

 private:
  std::string Key(int64_t round) const;
  c10::intrusive_ptr<c10d::Store> store() const;

  const std::string group_;
  const int64_t channel_;
  std::array<std::atomic<int64_t>, 3> begun_{};
  std::atomic<int64_t> round_ = 0;
  std::atomic<bool> left_ = false;
};

}  // namespace hsdp_ckpt::hsdp
