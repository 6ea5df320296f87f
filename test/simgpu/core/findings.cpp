#include "simgpu/core/findings.h"

#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <numeric>

namespace simgpu {

const char* NameOf(Fault fault) {
  switch (fault) {
    case Fault::kRace:
      return "race";
    case Fault::kHostTooEarly:
      return "host too early";
    case Fault::kHostOnDevice:
      return "host on device memory";
    case Fault::kNotAllocated:
      return "memory that is not allocated";
    case Fault::kMismatch:
      return "collectives that differ";
    case Fault::kDeadlock:
      return "deadlock";
    case Fault::kUnknownCall:
      return "unknown call";
  }
  return "";
}

Findings& Findings::Get() {
  static auto& findings = *new Findings;  // threads report until the process is gone
  return findings;
}

void Findings::Add(Fault fault, const std::string& key, const std::string& text) {
  std::string line;
  {
    const std::lock_guard lock(mutex_);
    ++counts_[static_cast<size_t>(fault)];
    if (!seen_.emplace(fault, key).second) return;
    line = std::string("simgpu: ") + NameOf(fault) + ": " + text;
    texts_.push_back(line);
  }
  std::fprintf(stderr, "%s [process %d]\n", line.c_str(), getpid());
}

uint64_t Findings::count() const {
  const std::lock_guard lock(mutex_);
  return std::accumulate(counts_.begin(), counts_.end(), uint64_t{0});
}

std::string Findings::text() const {
  const std::lock_guard lock(mutex_);
  std::string out;
  for (const std::string& line : texts_) out += line + "\n";
  return out;
}

void Findings::Clear() {
  const std::lock_guard lock(mutex_);
  counts_ = {};
  seen_.clear();
  texts_.clear();
}

void PrintPythonStacks() {
  struct sigaction action{};
  if (sigaction(SIGUSR2, nullptr, &action) != 0) return;
  const bool handled = (action.sa_flags & SA_SIGINFO) != 0 || action.sa_handler != SIG_DFL;
  if (handled) raise(SIGUSR2);
}

}  // namespace simgpu
