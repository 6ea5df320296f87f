#include "checkpoint/commit/process_identity.h"

#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <utility>

#include "base/bytes.h"
#include "base/crc32.h"

namespace hsdp_ckpt::checkpoint {
namespace {

std::string FirstLine(const std::string& path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}

// What /proc/PID/stat says of a process; a start of 0 if there is none.
struct ProcessState {
  char state = 0;
  int64_t threads = 0;
  uint64_t start = 0;
};

ProcessState StateOf(const std::string& pid) {
  ProcessState out;
  const std::string line = FirstLine("/proc/" + pid + "/stat");
  // The second field, the name, may hold blanks and brackets.
  const size_t name_end = line.rfind(')');
  if (name_end == std::string::npos) return out;
  std::istringstream fields(line.substr(name_end + 1));
  std::string field;
  for (int i = 3; i <= 22; ++i) {
    fields >> field;
    const char* end = field.data() + field.size();
    if (i == 3 && !field.empty()) out.state = field[0];
    if (i == 20) std::from_chars(field.data(), end, out.threads);
    if (i == 22) std::from_chars(field.data(), end, out.start);
  }
  return out;
}

// A process that was killed stays as a zombie until its parent asks for it, which in a container
// may be never. With more than one thread its others may still be in a write.
bool IsZombie(const ProcessState& process) {
  return (process.state == 'Z' || process.state == 'X') && process.threads <= 1;
}

// Seconds since the epoch at which this machine booted; 0 if unknown.
int64_t BootTime() {
  std::ifstream in("/proc/stat");
  std::string key;
  int64_t value = 0;
  for (std::string line; std::getline(in, line);) {
    std::istringstream fields(line);
    if (fields >> key >> value && key == "btime") return value;
  }
  return 0;
}

// Of a process of this boot and PID namespace.
Liveness LivenessHere(const format::ProcessIdentity& process) {
  if (::kill(static_cast<pid_t>(process.pid), 0) < 0 && errno == ESRCH) return Liveness::kDead;
  const ProcessState found = StateOf(std::to_string(process.pid));
  if (found.start == 0) return Liveness::kUnknown;
  const bool dead = found.start != process.start || IsZombie(found);
  return dead ? Liveness::kDead : Liveness::kRunning;
}

}  // namespace

format::ProcessIdentity ThisProcess() {
  char host[256] = {};
  ::gethostname(host, sizeof(host) - 1);
  char space[64] = {};
  if (::readlink("/proc/self/ns/pid", space, sizeof(space) - 1) < 0) space[0] = 0;
  const std::string boot_id = FirstLine("/proc/sys/kernel/random/boot_id");
  format::ProcessIdentity self;
  self.host = base::Crc32(base::AsBytes(std::string(host) + "\n" + FirstLine("/etc/machine-id")));
  self.boot = boot_id.empty() ? 0 : base::Crc32(base::AsBytes(boot_id + "\n" + space));
  self.pid = ::getpid();
  self.start = StateOf("self").start;
  return self;
}

OwnerLiveness LookAtProcesses() {
  using Key = std::pair<int64_t, uint64_t>;  // pid and start
  return [self = ThisProcess(), booted = BootTime(), seen = std::map<Key, Liveness>()](
             const format::ProcessIdentity& owner, int64_t modified) mutable {
    if (owner.host != self.host || owner.boot == 0 || self.boot == 0 || owner.start == 0)
      return Liveness::kUnknown;
    if (owner.boot != self.boot) {
      // Another container on this host has another boot field too, so the file's age must prove it.
      return booted > 0 && modified < booted ? Liveness::kDead : Liveness::kUnknown;
    }
    const auto [found, added] = seen.try_emplace({owner.pid, owner.start}, Liveness::kUnknown);
    if (added) found->second = LivenessHere(owner);
    return found->second;
  };
}

}  // namespace hsdp_ckpt::checkpoint
