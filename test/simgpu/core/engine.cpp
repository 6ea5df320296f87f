#include "simgpu/core/engine.h"

#include <pthread.h>

#include <cstdio>
#include <cstring>
#include <sstream>
#include <thread>

#include "simgpu/core/faults.h"
#include "simgpu/core/findings.h"

namespace simgpu {

using std::chrono::steady_clock;

bool IsOnlooker() {
  char name[16] = {};
  pthread_getname_np(pthread_self(), name, sizeof name);
  return std::strncmp(name, "pt_nccl", 7) == 0;
}

Engine::Engine(const Settings& settings)
    : settings_(settings),
      memory_(settings.devices, settings.device_bytes),
      host_(settings.pinned_bytes),
      job_(settings.directory),
      scheduler_(settings.seed, settings.pace) {
  for (int d = 0; d < settings.devices; ++d) NewStream(d);
  if (settings.idle_ms > 0) {
    std::thread([this] { GoOnByItself(); }).detach();
  }
}

Engine::~Engine() = default;

namespace {
std::atomic<Engine*> made = nullptr;
}  // namespace

Engine* Engine::IfMade() { return made; }

Engine& Engine::Get() {
  static Engine& engine = [&]() -> Engine& {
    const Settings& settings = Settings::Get();
    std::fprintf(stderr, "simgpu: seed %lu\n", settings.seed);
    auto* fresh = new Engine(settings);  // its thread runs as long as the process
    made = fresh;
    CatchFaults();
    return *fresh;
  }();
  return engine;
}

// ---- memory
// --------------------------------------------------------------------------------------

void* Engine::Allocate(int device, size_t bytes) {
  const Lock lock(mutex_);
  return memory_.Allocate(device, bytes);
}

bool Engine::Free(void* ptr) {
  const int device = memory_.DeviceOf(ptr);
  if (device < 0) return false;
  SynchronizeDevice(device);
  const Lock lock(mutex_);
  const size_t bytes = memory_.Free(ptr);
  const auto first = reinterpret_cast<uintptr_t>(ptr);
  races_.Forget(first, first + bytes);
  return bytes > 0;
}

size_t Engine::used(int device) {
  const Lock lock(mutex_);
  return memory_.used(device);
}

bool Engine::IsAllocated(const void* ptr, size_t bytes) {
  const Lock lock(mutex_);
  return memory_.IsAllocated(ptr, bytes);
}

// ---- issuing
// -------------------------------------------------------------------------------------

int Engine::NewStream(int device) {
  const auto id = static_cast<int>(streams_.size());
  streams_.emplace_back();
  streams_.back().device = device;
  streams_.back().hardware_queue = id % settings_.hardware_queues;
  scheduler_.AddStream();
  return id;
}

int Engine::CreateStream(int device) {
  const Lock lock(mutex_);
  return NewStream(device);
}

int Engine::DeviceOfStream(int id) {
  const Lock lock(mutex_);
  return stream(id).device;
}

void Engine::Push(int id, Operation operation) {
  Stream& s = stream(id);
  s.clock.Join(host_clock_);
  Queued queued;
  queued.time = s.clock.Tick(id);
  queued.issue = ++issues_;
  if (operation.kind == Kind::kWait) s.clock.Join(operation.event->clock);
  queued.clock = std::make_shared<const Clock>(s.clock);
  ++s.issued;
  if (operation.kind == Kind::kRecord) {
    *operation.event = {false, s.clock, id, s.issued};
  }
  if (operation.meeting) {
    queued.turn = communicators_[operation.meeting->communicator()].issued++;
  }
  ++counts_.issued[static_cast<size_t>(operation.kind)];
  if (operation.kind == Kind::kCollective && id == default_stream(s.device)) {
    ++counts_.collectives_on_default_streams;
  }
  if (settings_.trace) {
    std::fprintf(stderr, "simgpu: issue %lu: %s on stream %d\n", queued.issue,
                 operation.name.c_str(), id);
  }
  queued.operation = std::move(operation);
  CheckAccesses(queued, id, queued.operation.accesses);
  GuardHostMemory(queued, id);
  HardwareQueue(s).insert(queued.issue);
  s.queue.push_back(std::move(queued));
  ++activity_;
  job_.SayGoesOn();
}

void Engine::GuardHostMemory(const Queued& queued, int id) {
  for (const Access& access : queued.operation.accesses) {
    const auto* ptr = reinterpret_cast<const void*>(access.first);
    if (access.first >= access.last || memory_.DeviceOf(ptr) >= 0 || !host_.IsPinned(ptr)) continue;
    CatchFaults();
    host_.Guard(access.first, access.last, access.writes, id, queued.time, queued.operation.name);
  }
}

void Engine::Issue(int id, Operation operation, bool steps) {
  Lock lock(mutex_);
  Push(id, std::move(operation));
  while (steps && scheduler_.StepsAfterIssue() && Step(lock) == Stepped::kRan) {
  }
}

std::shared_ptr<Event> Engine::Record(int id) {
  auto event = std::make_shared<Event>();
  Operation operation;
  operation.kind = Kind::kRecord;
  operation.name = "event record";
  operation.event = event;
  const Lock lock(mutex_);
  Push(id, std::move(operation));
  return event;
}

void Engine::Wait(int id, std::shared_ptr<Event> event) {
  Operation operation;
  operation.kind = Kind::kWait;
  operation.name = "event wait";
  operation.event = std::move(event);
  const Lock lock(mutex_);
  Push(id, std::move(operation));
}

// ---- running
// -------------------------------------------------------------------------------------

bool Engine::MayStart(const Stream& s) const {
  const Queued& head = s.queue.front();
  const auto unstarted = unstarted_.find({s.device, s.hardware_queue});
  if (*unstarted->second.begin() != head.issue) return false;
  if (head.operation.kind == Kind::kWait) return head.operation.event->done;
  if (!head.operation.meeting) return true;
  return communicators_.at(head.operation.meeting->communicator()).done == head.turn;
}

Engine::Runnable Engine::FindRunnable() {
  Runnable found;
  for (size_t i = 0; i < streams_.size(); ++i) {
    const Stream& s = streams_[i];
    if (s.queue.empty()) continue;
    if (s.queue.front().started) {
      found.polling.push_back(static_cast<int>(i));
    } else if (MayStart(s)) {
      found.ready.push_back(static_cast<int>(i));
    }
  }
  return found;
}

/// Takes one operation that may run a step further. The lock is given up meanwhile.
Engine::Stepped Engine::Step(Lock& lock) {
  if (running_) {
    changed_.wait_for(lock, std::chrono::milliseconds(10));
    return Stepped::kRan;
  }
  const Runnable runnable = FindRunnable();
  if (runnable.ready.empty() && runnable.polling.empty()) return Stepped::kNothing;
  const int chosen = scheduler_.Choose(runnable.ready, runnable.polling);
  const bool over = Run(lock, chosen);
  if (over) job_.SayGoesOn();
  return over || !runnable.ready.empty() ? Stepped::kRan : Stepped::kInVain;
}

/// Runs the first operation of a stream, or looks whether its meeting is over. True: it is over.
bool Engine::Run(Lock& lock, int id) {
  Stream& s = stream(id);
  Queued& head = s.queue.front();
  if (!head.started) {
    head.started = true;
    HardwareQueue(s).erase(head.issue);
    if (head.operation.late_accesses) CheckAccesses(head, id, head.operation.late_accesses());
    if (settings_.trace) {
      std::fprintf(stderr, "simgpu: run %lu: %s on stream %d\n", head.issue,
                   head.operation.name.c_str(), id);
    }
  }
  bool over = true;
  if (head.operation.kind == Kind::kRecord) {
    head.operation.event->done = true;
  } else if (head.operation.meeting) {
    running_ = true;
    lock.unlock();
    over = head.operation.meeting->Poll();
    lock.lock();
    running_ = false;
    if (over) ++communicators_[head.operation.meeting->communicator()].done;
  } else if (head.operation.run) {
    Perform(lock, head.operation);
  }
  if (over) {
    ++s.done;
    s.queue.pop_front();
  }
  changed_.notify_all();
  return over;
}

void Engine::Perform(Lock& lock, const Operation& operation) {
  running_ = true;
  lock.unlock();
  std::string failure;
  {
    std::deque<HostMemory::Opened> opened;
    for (const Access& access : operation.accesses) {
      const auto* ptr = reinterpret_cast<const void*>(access.first);
      if (access.first < access.last && memory_.DeviceOf(ptr) < 0 && host_.IsPinned(ptr)) {
        opened.emplace_back(host_, access.first, access.last);
      }
    }
    try {
      operation.run();
    } catch (const std::exception& error) {
      failure = "'" + operation.name + "' failed: " + error.what();
    }
  }
  lock.lock();
  running_ = false;
  if (!failure.empty() && failure_.empty()) failure_ = failure;
}

void Engine::CheckAccesses(const Queued& queued, int id, const std::vector<Access>& accesses) {
  for (const Access& access : accesses) {
    const auto* ptr = reinterpret_cast<const void*>(access.first);
    const size_t bytes = access.last - access.first;
    if (bytes == 0 || memory_.DeviceOf(ptr) < 0 || memory_.IsAllocated(ptr, bytes)) continue;
    std::ostringstream text;
    text << "'" << queued.operation.name << "' (stream " << id << ") touches " << bytes
         << " bytes at 0x" << std::hex << access.first << " that are not allocated";
    Findings::Get().Add(Fault::kNotAllocated, queued.operation.name, text.str());
  }
  races_.Touch(queued.operation.name, id, queued.time, queued.issue, queued.clock, accesses);
}

/// A device goes on while the host does something else.
void Engine::GoOnByItself() {
  pthread_setname_np(pthread_self(), "simgpu_device");
  uint64_t seen = 0;
  for (;;) {
    std::this_thread::sleep_for(std::chrono::milliseconds(settings_.idle_ms));
    if (const uint64_t now = activity_; now != seen) {
      seen = now;
      continue;
    }
    Lock lock(mutex_);
    while (activity_ == seen && Step(lock) == Stepped::kRan) {
    }
  }
}

// ---- the host waits
// ------------------------------------------------------------------------------

void Engine::LearnThat(const Clock& clock) {
  if (IsOnlooker()) return;
  host_clock_.Join(clock);
  host_.Release(host_clock_);
}

template <typename Condition>
void Engine::RunUntil(Lock& lock, const Condition& condition) {
  ++counts_.host_waits;
  while (!condition()) {
    ++activity_;
    if (Step(lock) == Stepped::kRan || condition()) continue;
    ReportIfDeadlocked(lock);
    changed_.wait_for(lock, std::chrono::microseconds(200));
  }
  job_.SayGoesOn();
}

bool Engine::Query(const std::shared_ptr<Event>& event) {
  Lock lock(mutex_);
  const bool learns = !IsOnlooker();
  bool went_on = false;
  if (learns) {
    ++counts_.queries;
    if (!event->done && scheduler_.StepsAtQuery()) went_on = Step(lock) == Stepped::kRan;
  }
  if (!event->done) {
    // Who asks again and again, and nothing goes on, is blocked as much as who waits.
    const auto now = steady_clock::now();
    if (went_on || now - queried_ > std::chrono::milliseconds(50)) {
      queries_since_ = now;
    } else if (now - queries_since_ > std::chrono::milliseconds(500)) {
      ReportIfDeadlocked(lock);
    }
    queried_ = now;
    return false;
  }
  if (learns) LearnThat(event->clock);
  return true;
}

void Engine::Synchronize(const std::shared_ptr<Event>& event) {
  Lock lock(mutex_);
  RunUntil(lock, [&] { return event->done; });
  LearnThat(event->clock);
}

bool Engine::QueryStream(int id) {
  Lock lock(mutex_);
  ++counts_.queries;
  if (!stream(id).queue.empty() && scheduler_.StepsAtQuery()) Step(lock);
  if (!stream(id).queue.empty()) return false;
  LearnThat(stream(id).clock);
  return true;
}

void Engine::SynchronizeStream(int id) {
  Lock lock(mutex_);
  const uint64_t target = stream(id).issued;
  const Clock clock = stream(id).clock;
  RunUntil(lock, [&] { return stream(id).done >= target; });
  LearnThat(clock);
}

void Engine::SynchronizeDevice(int device) {
  size_t streams = 0;
  {
    const Lock lock(mutex_);
    streams = streams_.size();
  }
  for (size_t i = 0; i < streams; ++i) {
    if (DeviceOfStream(static_cast<int>(i)) == device) SynchronizeStream(static_cast<int>(i));
  }
}

// ---- deadlocks
// -----------------------------------------------------------------------------------

void Engine::SayWhatIsWaitedFor() {
  std::vector<uint64_t> missing;
  for (const Stream& s : streams_) {
    if (!s.queue.empty() && s.queue.front().started && s.queue.front().operation.meeting) {
      missing.push_back(s.queue.front().operation.meeting->missing());
    }
  }
  job_.SayBlocked(missing, Words());
}

std::string Engine::Words() {
  std::ostringstream out;
  for (size_t i = 0; i < streams_.size(); ++i) {
    const Stream& s = streams_[i];
    if (s.queue.empty()) continue;
    const Queued& head = s.queue.front();
    out << "    stream " << i << " (device " << s.device << "): " << s.queue.size()
        << " operations, at '" << head.operation.name << "'";
    if (head.operation.kind == Kind::kWait) {
      out << " for operation " << head.operation.event->number << " of stream "
          << head.operation.event->stream;
    }
    if (head.operation.meeting && head.started) {
      out << ", waits for " << head.operation.meeting->absent();
    } else if (head.operation.meeting) {
      out << ", not started";
    }
    out << "\n";
  }
  return out.str();
}

/// The process ends where it can never go on.
void Engine::ReportIfDeadlocked(Lock& lock) {
  const auto now = steady_clock::now();
  if (now - looked_ < std::chrono::milliseconds(20)) return;
  looked_ = now;
  SayWhatIsWaitedFor();
  const Job::Look look = job_.LookForDeadlock();
  if (look.places == 0) {
    suspected_.reset();
    return;
  }
  if (!suspected_ || !(suspected_->first == look)) {
    suspected_ = {look, now};
    return;
  }
  if (now - suspected_->second < std::chrono::duration<double>(settings_.deadlock_s)) return;
  Findings::Get().Add(Fault::kDeadlock, "deadlock",
                      "these processes wait for each other or for one that has ended:\n" +
                          job_.WordsOf(look.places));
  lock.unlock();
  PrintPythonStacks();
  // Peers look too, and say the same: they are given the time for it.
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  std::_Exit(kDeadlockExit);
}

std::string Engine::failure() {
  const Lock lock(mutex_);
  return failure_;
}

Counts Engine::counts() {
  const Lock lock(mutex_);
  return counts_;
}

void Engine::Restart(uint64_t seed, Pace pace) {
  const Lock lock(mutex_);
  scheduler_.Restart(seed, pace);
}

}  // namespace simgpu
