#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "hsdp/peers.h"
#include "hsdp/unit.h"

namespace hsdp_ckpt::hsdp {

/// The order in which forward calls the units of one root, compared with that of the last pass.
///
/// The last pass tells which unit comes next, so that its gather can start ahead. All ranks have to
/// issue the same gathers in the same order: a rank whose calls are others than in its last pass
/// asks its peers first whether theirs are too (`Agree`). A pass begins with Begin, follows call by
/// call, and ends with CheckEnd and Keep; LoseTrack ends one that raised. Thread safety: none.
class ForwardOrder {
 public:
  /// `units`: all units of the root, in the same order on all ranks; they must outlive this object.
  /// `peers`: between all ranks; null for one rank alone. `rank`: in the default group, for errors.
  ForwardOrder(const UnitSequence& units, std::shared_ptr<Peers> peers, int64_t rank)
      : units_(units), peers_(std::move(peers)), rank_(rank) {}

  /// A pass of `outermost` begins. Collective if it is another one than the last pass's. Throws
  /// c10::Error where the ranks differ, or where one does not come in time; so do the next two.
  void Begin(const UnitPtr& outermost);
  /// `unit` is called. Collective if another one was expected.
  void Follow(const UnitPtr& unit);
  /// The pass is over. Collective if the last one went on here.
  void CheckEnd();
  /// What has been called becomes the last pass.
  void Keep();
  /// Whether any rank has gradients pass through the frozen `unit`, of which this one says so
  /// `here`. Collective at the first time since ForgetPassed, and when gradients do where none did.
  bool IsPassedInBackward(const UnitPtr& unit, bool here);
  /// Which parameters are trained is about to change.
  void ForgetPassed() { passed_.clear(); }
  /// The pass has raised: it is no guide.
  void LoseTrack() { has_raised_ = true; }
  /// Nothing is known of the ranks' last passes.
  void Forget();
  /// The same number where the last passes have been the same.
  int64_t PassesDigest() const;

  /// Whether this pass has called what the last one called, and all of it; it may have raised.
  bool IsComplete() const { return on_track_ && position_ == LastPass().size(); }

  /// The unit that the last pass called next; null if it called none.
  UnitPtr Next() const;
  /// Whether `unit` was called last, where the last pass ended too.
  bool EndsWith(const UnitPtr& unit) const { return AtEnd() && calls_.back() == unit; }

 private:
  const UnitSequence& LastPass() const;
  bool AtEnd() const { return IsComplete() && !has_raised_; }
  void Agree(const Unit* unit) const;
  std::vector<std::vector<int64_t>> Ask(const Unit* unit, bool is_passed) const;
  int64_t IndexOf(const Unit* unit) const;
  std::string NameOf(int64_t index) const;

  const UnitSequence& units_;
  const std::shared_ptr<Peers> peers_;
  const int64_t rank_;
  /// The calls of each outermost unit's last pass, repeats included.
  std::map<const Unit*, UnitSequence> last_passes_;
  /// What is known of the backwards of a frozen unit.
  struct Passed {
    bool here, anywhere;
  };
  std::map<const Unit*, Passed> passed_;
  const Unit* outermost_ = nullptr;  // of this pass, or the last one
  UnitSequence calls_;               // of this pass
  size_t position_ = 0;              // in the last pass: the call that is expected next
  bool on_track_ = false;            // this pass has followed the last one so far
  bool has_raised_ = false;
};

}  // namespace hsdp_ckpt::hsdp
