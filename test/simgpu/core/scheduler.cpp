#include "simgpu/core/scheduler.h"

#include <algorithm>

namespace simgpu {

Scheduler::Scheduler(uint64_t seed, Pace pace) { Restart(seed, pace); }

void Scheduler::Restart(uint64_t seed, Pace pace) {
  random_.seed(seed);
  pace_ = pace;
  per_mille_ = 50 + 100 * (random_() % 8);
  Weigh();
}

void Scheduler::AddStream() { weights_.push_back(random_() % 1000); }

void Scheduler::Weigh() {
  for (uint64_t& weight : weights_) weight = random_() % 1000;
}

int Scheduler::Choose(const std::vector<int>& ready, const std::vector<int>& polling) {
  if (OneIn(8)) Weigh();
  if (ready.empty() || (!polling.empty() && OneIn(4))) return polling[random_() % polling.size()];
  return *std::max_element(ready.begin(), ready.end(), [&](int a, int b) {
    return weights_[static_cast<size_t>(a)] < weights_[static_cast<size_t>(b)];
  });
}

bool Scheduler::StepsAfterIssue() {
  if (pace_ == Pace::kLazy) return false;
  return pace_ == Pace::kEager || random_() % 1000 < per_mille_;
}

bool Scheduler::StepsAtQuery() { return OneIn(pace_ == Pace::kLazy ? 64 : 4); }

}  // namespace simgpu
