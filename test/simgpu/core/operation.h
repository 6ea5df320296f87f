#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "simgpu/core/clock.h"

namespace simgpu {

/// Bytes [first, last) of device memory or of pinned host memory that an operation touches.
struct Access {
  uintptr_t first = 0, last = 0;
  bool writes = false;
};
Access Reads(const void* data, size_t bytes);
Access Writes(const void* data, size_t bytes);

/// The last one is the simulator's own, and nobody's on a real device (aten/cuda_kernels.cpp).
enum class Kind : uint8_t {
  kKernel,
  kCopy,
  kMemset,
  kCollective,
  kRecord,
  kWait,
  kHostFunction,
  kPoison
};
constexpr int kKinds = 8;

/// One recording of an event. `done` is the engine's to change.
struct Event {
  bool done = false;
  Clock clock;
  int stream = -1;
  uint64_t number = 0;  ///< of the recording, among the operations of its stream
};

/// What several processes do together: over when all of them have come to it.
class Meeting {
 public:
  virtual ~Meeting() = default;
  /// Called again and again, from the moment that the operation's stream is there. True: over.
  virtual bool Poll() = 0;
  /// Processes (bits of Job's places) that are not there yet.
  virtual uint64_t missing() const = 0;
  /// The same, as the communicator calls them: "rank 3", say.
  virtual std::string absent() const = 0;
  /// Meetings of one communicator take place one after another, in the order of their issue.
  virtual int64_t communicator() const = 0;
};

/// Work for a stream, as whoever issues it describes it.
struct Operation {
  Kind kind = Kind::kKernel;
  std::string name;
  std::vector<Access> accesses;
  /// What is known only when it runs: pointers that stand in device memory.
  std::function<std::vector<Access>()> late_accesses;
  std::function<void()> run;         ///< all kinds but collectives, recordings and waits
  std::shared_ptr<Meeting> meeting;  ///< collectives
  std::shared_ptr<Event> event;      ///< recordings and waits
};

inline Access Reads(const void* data, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(data);
  return {first, first + bytes, false};
}
inline Access Writes(const void* data, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(data);
  return {first, first + bytes, true};
}

}  // namespace simgpu
