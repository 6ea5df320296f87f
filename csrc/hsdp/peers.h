#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "hsdp/departures.h"

namespace hsdp_ckpt::hsdp {

/// Small exchanges between all ranks of a root, where they have to be sure of each other before
/// they exchange tensors: ranks that issue different collectives in one group crash or corrupt each
/// other.
///
/// Ownership: none; the group is looked up by name at every call. Thread safety: one caller at a
/// time.
class Peers {
 public:
  /// `group`: the name of a Gloo group that nothing else uses, so that a rank which waits here
  /// can't meet another one's gather or reduction. `ranks`: the numbers that its ranks, in order,
  /// have in the default group. `channel`: of the root; the same on all ranks, another one for
  /// every other root.
  Peers(std::string group, std::vector<int64_t> ranks, int64_t channel)
      : group_(std::move(group)),
        ranks_(std::move(ranks)),
        departures_(Departures::Make(group_, channel)) {}

  /// Returns everybody's `words` in the order of the ranks, as many from each. Blocks until all
  /// ranks are here; throws what the group throws if they don't come within its timeout, and
  /// c10::DistBackendError if one has left the step (PendingWorks).
  std::vector<std::vector<int64_t>> Exchange(const std::vector<int64_t>& words) const;
  /// Returns what `shown` makes of each rank's words, a line for each; empty if they are all the
  /// same.
  std::string Differing(const std::vector<std::vector<int64_t>>& all,
                        const std::function<std::string(const std::vector<int64_t>&)>& shown) const;

  /// What the same ranks tell each other of errors.
  const std::shared_ptr<Departures>& departures() const { return departures_; }

 private:
  std::string group_;
  std::vector<int64_t> ranks_;
  std::shared_ptr<Departures> departures_;
};

}  // namespace hsdp_ckpt::hsdp
