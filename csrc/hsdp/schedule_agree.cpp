#include <algorithm>
#include <utility>

#include "hsdp/schedule.h"

namespace hsdp_ckpt::hsdp {

// A rank that is alone in leaving the last pass's order waits here, while its peers wait in a
// gather that it never joins: all of them fail within the groups' timeouts, and none has taken part
// in another one's collective.
void Schedule::Agree(const Unit* unit) {
  if (!peers_) return;
  constexpr const char* kRule = "All ranks must run the same wrapped modules in the same order";
  const auto call = static_cast<int64_t>(recorded_.size());
  const auto naming = [&](int64_t index) {
    return index < 0 ? std::string("the end of forward")
                     : "module " + units_[static_cast<size_t>(index)]->name();
  };
  const int64_t own = unit == nullptr ? -1 : IndexOf(unit);
  std::vector<std::vector<int64_t>> all;
  try {
    all = peers_->Exchange({own, call});
  } catch (const std::exception& error) {
    const Sequence& sequence = sequences_[outermost_];
    TORCH_CHECK(false, "rank ", rank_, " has reached ", naming(own), " (wrapped call ", call,
                " of this forward)",
                position_ < sequence.size()
                    ? ", its last forward ran module " + sequence[position_]->name() + " here"
                    : "",
                ", and no other rank has come along within the group's timeout. ", kRule, ". ",
                error.what());
  }
  const std::string differing = peers_->Differing(all, [&](const std::vector<int64_t>& words) {
    return naming(words[0]) + ", wrapped call " + std::to_string(words[1]) + " of its forward";
  });
  TORCH_CHECK(differing.empty(), "ranks run different wrapped modules (this is rank ", rank_, "). ",
              kRule, ":", differing);
}

int64_t Schedule::IndexOf(const Unit* unit) const {
  const auto at = std::find_if(units_.begin(), units_.end(),
                               [&](const auto& other) { return other.get() == unit; });
  return at - units_.begin();
}

}  // namespace hsdp_ckpt::hsdp
