#include "checkpoint/commit/process_identity.h"

#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <fstream>
#include <sstream>
#include <string>

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

// Field 22 of /proc/PID/stat; 0 if there is no such process. The second field, the name, may hold
// blanks and brackets.
uint64_t StartTime(const std::string& pid) {
  const std::string line = FirstLine("/proc/" + pid + "/stat");
  const size_t name_end = line.rfind(')');
  if (name_end == std::string::npos) return 0;
  std::istringstream fields(line.substr(name_end + 1));
  std::string field;
  for (int i = 3; i <= 22; ++i) fields >> field;
  uint64_t start = 0;
  std::from_chars(field.data(), field.data() + field.size(), start);
  return start;
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
  self.start = StartTime("self");
  return self;
}

bool IsProvablyDead(const format::ProcessIdentity& process, int64_t modified) {
  const format::ProcessIdentity self = ThisProcess();
  if (process.host != self.host || process.boot == 0 || self.boot == 0 || process.start == 0)
    return false;
  if (process.boot != self.boot) {
    // Another container on this host has another boot field too, so the file's age must prove it.
    const int64_t booted = BootTime();
    return booted > 0 && modified < booted;
  }
  if (::kill(static_cast<pid_t>(process.pid), 0) < 0) return errno == ESRCH;
  const uint64_t start = StartTime(std::to_string(process.pid));
  return start != 0 && start != process.start;
}

}  // namespace hsdp_ckpt::checkpoint
