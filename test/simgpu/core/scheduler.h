#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "simgpu/core/settings.h"

namespace simgpu {

/// Which of the operations that may run does, and how far the device gets while the host issues:
/// all of it drawn from the seed.
///
/// Streams have weights that change now and then, so that one of them may be far ahead of another
/// for a while, which fair turns would never show.
class Scheduler {
 public:
  Scheduler(uint64_t seed, Pace pace);

  void AddStream();
  /// One of `ready` (streams that can go on) or `polling` (streams in meetings); not both are
  /// empty.
  int Choose(const std::vector<int>& ready, const std::vector<int>& polling);
  /// Whether the device takes another step right after an issue.
  bool StepsAfterIssue();
  /// Whether it takes one when the host asks if an event is over.
  bool StepsAtQuery();

  Pace pace() const { return pace_; }
  void Restart(uint64_t seed, Pace pace);

 private:
  bool OneIn(uint64_t n) { return random_() % n == 0; }
  void Weigh();

  std::mt19937_64 random_;
  Pace pace_ = Pace::kMixed;
  uint64_t per_mille_ = 0;  // of steps after an issue
  std::vector<uint64_t> weights_;
};

}  // namespace simgpu
