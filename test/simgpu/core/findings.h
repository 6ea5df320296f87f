#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace simgpu {

/// What is wrong with a program, in the simulator's eyes.
enum class Fault : uint8_t {
  kRace,          ///< two operations, at least one of which writes, in no order
  kHostTooEarly,  ///< the host touched pinned memory that the device may be at
  kHostOnDevice,  ///< the host touched device memory
  kNotAllocated,  ///< an operation on device memory that is not allocated
  kMismatch,      ///< ranks that came to one collective with different ones
  kDeadlock,      ///< ranks that wait for each other
  kUnknownCall,   ///< a call that the simulator does not know
};
constexpr int kFaults = 7;
const char* NameOf(Fault fault);

/// All that was found in this process. Each is written to stderr as it is found; of those that name
/// the same two operations only the first.
class Findings {
 public:
  static Findings& Get();

  /// `key`: what makes two findings the same one, such as the names of two operations.
  void Add(Fault fault, const std::string& key, const std::string& text);
  uint64_t count() const;
  std::string text() const;
  void Clear();

 private:
  mutable std::mutex mutex_;
  std::array<uint64_t, kFaults> counts_{};
  std::set<std::pair<Fault, std::string>> seen_;
  std::vector<std::string> texts_;
};

/// Prints the Python stacks of all threads of this process, where Python's faulthandler was told to
/// (SIGUSR2).
void PrintPythonStacks();

}  // namespace simgpu
