#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "simgpu/core/device_memory.h"
#include "simgpu/core/host_memory.h"
#include "simgpu/core/job.h"
#include "simgpu/core/operation.h"
#include "simgpu/core/race_detector.h"
#include "simgpu/core/scheduler.h"
#include "simgpu/core/settings.h"

namespace simgpu {

/// What the host has asked the devices for.
struct Counts {
  std::array<uint64_t, kKinds> issued{};  ///< by Kind
  uint64_t host_waits = 0;                ///< for an event, a stream or a device
  uint64_t queries = 0;
  uint64_t collectives_on_default_streams = 0;
};

/// The devices of this process: streams are queues of operations, and an operation that may run
/// does so when somebody steps the engine: a host that waits, a host that issues (as the pace has
/// it), or the engine's own thread once nobody has talked to it for a while. One operation runs at
/// a time, on the thread that steps.
///
/// May run: the first of its stream, once the operations before it in its hardware queue have
/// started, its event is done (waits), its communicator's turn has come (collectives).
///
/// Thread safety: all of it. Host threads share one clock: what one of them has waited for, all
/// know. That misses races between threads of the host, and reports none that is not one.
class Engine {
 public:
  explicit Engine(const Settings& settings);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  /// The process's own, made at the first call. Its end is the process's.
  static Engine& Get();
  /// Null before that.
  static Engine* IfMade();

  // Memory. Freeing waits for the device, as the driver does.
  void* Allocate(int device, size_t bytes);
  bool Free(void* ptr);
  size_t used(int device);
  bool IsAllocated(const void* ptr, size_t bytes);
  int DeviceOf(const void* ptr) const { return memory_.DeviceOf(ptr); }
  void* Hands(const void* ptr) const { return memory_.Hands(ptr); }
  HostMemory& host_memory() { return host_; }

  // Streams and events.
  int CreateStream(int device);
  int default_stream(int device) const { return device; }
  int DeviceOfStream(int stream);
  /// `steps`: whether the device may go on at once; not for callers who hold a lock that an
  /// operation may want.
  void Issue(int stream, Operation operation, bool steps = true);
  std::shared_ptr<Event> Record(int stream);
  void Wait(int stream, std::shared_ptr<Event> event);
  bool Query(const std::shared_ptr<Event>& event);
  void Synchronize(const std::shared_ptr<Event>& event);
  bool QueryStream(int stream);
  void SynchronizeStream(int stream);
  void SynchronizeDevice(int device);

  /// Why the devices are lost, as after an assertion in a kernel; empty: they are not.
  std::string failure();
  Counts counts();
  void Restart(uint64_t seed, Pace pace);
  int place() const { return job_.place(); }

 private:
  struct Queued {
    Operation operation;
    std::shared_ptr<const Clock> clock;
    uint32_t time = 0;
    uint64_t issue = 0;
    uint64_t turn = 0;  // in its communicator
    bool started = false;
  };
  struct Stream {
    int device = 0;
    int hardware_queue = 0;
    std::deque<Queued> queue;
    uint64_t issued = 0, done = 0;
    Clock clock;
  };
  struct Turns {  // of a communicator
    uint64_t issued = 0, done = 0;
  };
  struct Runnable {
    std::vector<int> ready, polling;
  };
  enum class Stepped : uint8_t { kRan, kInVain, kNothing };
  using Lock = std::unique_lock<std::mutex>;

  Stream& stream(int id) { return streams_.at(static_cast<size_t>(id)); }
  std::set<uint64_t>& HardwareQueue(const Stream& s) {
    return unstarted_[{s.device, s.hardware_queue}];
  }
  int NewStream(int device);
  void Push(int stream, Operation operation);
  void GuardHostMemory(const Queued& queued, int stream);
  bool MayStart(const Stream& s) const;
  Runnable FindRunnable();
  Stepped Step(Lock& lock);
  bool Run(Lock& lock, int stream);
  void CheckAccesses(const Queued& queued, int stream, const std::vector<Access>& accesses);
  void Perform(Lock& lock, const Operation& operation);
  template <typename Condition>
  void RunUntil(Lock& lock, const Condition& condition);
  void LearnThat(const Clock& clock);
  void SayWhatIsWaitedFor();
  void ReportIfDeadlocked(Lock& lock);
  std::string Words();
  void GoOnByItself();

  const Settings settings_;
  DeviceMemory memory_;
  HostMemory host_;
  Job job_;

  std::mutex mutex_;
  std::condition_variable changed_;
  Scheduler scheduler_;
  RaceDetector races_;
  std::deque<Stream> streams_;
  std::map<std::pair<int, int>, std::set<uint64_t>> unstarted_;  // by device and hardware queue
  std::map<int64_t, Turns> communicators_;
  Clock host_clock_;
  Counts counts_;
  uint64_t issues_ = 0;
  bool running_ = false;  // an operation, with the lock given up
  std::string failure_;
  std::optional<std::pair<Job::Look, std::chrono::steady_clock::time_point>> suspected_;
  std::chrono::steady_clock::time_point looked_, queried_, queries_since_;
  std::atomic<uint64_t> activity_ = 0;  // of the host
};

/// Threads that look at events for their own sake, of which nobody learns that they are over: the
/// watchdogs of process groups.
bool IsOnlooker();

}  // namespace simgpu
