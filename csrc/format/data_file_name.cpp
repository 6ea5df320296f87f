#include "format/data_file_name.h"

#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstdio>
#include <fstream>
#include <random>
#include <regex>
#include <sstream>

#include "base/bytes.h"
#include "base/crc32.h"

namespace hsdp_ckpt::format {
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

template <typename T>
T Number(const std::ssub_match& match, int base) {
  T value = 0;
  const std::string text = match.str();
  std::from_chars(text.data(), text.data() + text.size(), value, base);
  return value;
}

}  // namespace

ProcessIdentity ThisProcess() {
  char host[256] = {};
  ::gethostname(host, sizeof(host) - 1);
  char space[64] = {};
  if (::readlink("/proc/self/ns/pid", space, sizeof(space) - 1) < 0) space[0] = 0;
  const std::string boot_id = FirstLine("/proc/sys/kernel/random/boot_id");
  ProcessIdentity self;
  self.host = base::Crc32(base::AsBytes(std::string(host) + "\n" + FirstLine("/etc/machine-id")));
  self.boot = boot_id.empty() ? 0 : base::Crc32(base::AsBytes(boot_id + "\n" + space));
  self.pid = ::getpid();
  self.start = StartTime("self");
  return self;
}

bool IsProvablyDead(const ProcessIdentity& process, int64_t modified) {
  const ProcessIdentity self = ThisProcess();
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

std::string DataFileName::ToString() const {
  char text[160];
  std::snprintf(text, sizeof(text), "__%lld_%016llx_%08x_%08x_%lld_%llu%s_%lld.distcp",
                static_cast<long long>(rank), static_cast<unsigned long long>(save_id), owner.host,
                owner.boot, static_cast<long long>(owner.pid),
                static_cast<unsigned long long>(owner.start), by_torch ? "_torch" : "",
                static_cast<long long>(number));
  return text;
}

std::optional<DataFileName> DataFileName::Parse(const std::string& name) {
  static const auto& pattern = *new std::regex(
      R"(__(\d{1,9})_([0-9a-f]{16})_([0-9a-f]{8})_([0-9a-f]{8})_(\d{1,18})_(\d{1,19})(_torch)?_(\d{1,18})\.distcp)");
  std::smatch match;
  if (!std::regex_match(name, match, pattern)) return std::nullopt;
  DataFileName out;
  out.rank = Number<int64_t>(match[1], 10);
  out.save_id = Number<uint64_t>(match[2], 16);
  out.owner = {Number<uint32_t>(match[3], 16), Number<uint32_t>(match[4], 16),
               Number<int64_t>(match[5], 10), Number<uint64_t>(match[6], 10)};
  out.by_torch = match[7].matched;
  out.number = Number<int64_t>(match[8], 10);
  // Leading zeros would give one file two names.
  return out.ToString() == name ? std::optional(out) : std::nullopt;
}

uint64_t NewSaveId() {
  std::random_device device;
  return uint64_t{device()} << 32 | device();
}

}  // namespace hsdp_ckpt::format
