#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

namespace simgpu {

/// How a process of a job has ended.
struct Ended {
  int status = 0;         ///< its exit status; -signal where one has ended it
  uint64_t findings = 0;  ///< of its own, where it came to its end
  std::string text;       ///< all that it has written
};

/// Calls `program(rank)` in processes of their own, which share a job; none of them has an engine
/// before. `environment`: what the settings are read from.
std::vector<Ended> RunRanks(int size, const std::map<std::string, std::string>& environment,
                            const std::function<void(int rank)>& program);

}  // namespace simgpu
