#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace simgpu {

/// A vector clock: of each stream, the number of the last of its operations that is known to be
/// over. One operation comes before another if the other's clock knows it.
class Clock {
 public:
  uint32_t at(int stream) const {
    const auto i = static_cast<size_t>(stream);
    return i < times_.size() ? times_[i] : 0;
  }
  bool Knows(int stream, uint32_t time) const { return at(stream) >= time; }

  /// The next operation of a stream; returns its time.
  uint32_t Tick(int stream) {
    const auto i = static_cast<size_t>(stream);
    if (i >= times_.size()) times_.resize(i + 1);
    return ++times_[i];
  }
  void Join(const Clock& other) {
    if (times_.size() < other.times_.size()) times_.resize(other.times_.size());
    for (size_t i = 0; i < other.times_.size(); ++i) {
      times_[i] = std::max(times_[i], other.times_[i]);
    }
  }

 private:
  std::vector<uint32_t> times_;
};

}  // namespace simgpu
