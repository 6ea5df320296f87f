#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace simgpu {

/// How fast the device is beside the host: it does as little as it may before somebody waits for it
/// (lazy), all that it can at once (eager), or now this, now that (mixed).
enum class Pace : uint8_t { kLazy, kMixed, kEager };

/// What the environment says, read once a process.
struct Settings {
  int devices = 4;                        ///< SIMGPU_DEVICES
  size_t device_bytes = size_t{8} << 30;  ///< of each; SIMGPU_DEVICE_MB
  size_t pinned_bytes = SIZE_MAX;         ///< of pinned host memory in all; SIMGPU_PINNED_MB
  uint64_t seed = 0;                      ///< SIMGPU_SEED
  /// SIMGPU_PACE: lazy, mixed, eager. Unset: lazy with every third seed from 0 on, else mixed.
  Pace pace = Pace::kLazy;
  int hardware_queues = 8;             ///< CUDA_DEVICE_MAX_CONNECTIONS
  int idle_ms = 4;                     ///< SIMGPU_IDLE_MS: the device goes on by itself after that
  double deadlock_s = 1.0;             ///< SIMGPU_DEADLOCK_S: blocked that long is a deadlock
  bool trace = false;                  ///< SIMGPU_TRACE=1: every operation, to stderr
  bool poison_frees = true;            ///< SIMGPU_POISON_FREES=0: memory is whole until given out
  std::string directory = "/dev/shm";  ///< SIMGPU_DIR: what the ranks of a job share

  /// Raises std::invalid_argument that names the variable, for a value that is none of its own.
  static Settings FromEnvironment();
  static const Settings& Get();
};

}  // namespace simgpu
