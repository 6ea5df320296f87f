#include "simgpu/core/job.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <system_error>

namespace simgpu {

bool HasEnded(int process) {
  std::ifstream file("/proc/" + std::to_string(process) + "/stat");
  std::string text;
  if (!std::getline(file, text)) return true;
  const size_t name_ends = text.rfind(')');  // a name may hold anything
  return name_ends == std::string::npos || text.compare(name_ends, 3, ") Z") == 0;
}

Job::Job(const std::string& directory) {
  const std::string path = directory + "/simgpu_job";
  const int file = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  // New bytes are zeros, which is what an empty table holds: whoever comes first need not say so.
  if (file < 0 || ftruncate(file, sizeof(Table)) != 0) {
    throw std::system_error(errno, std::generic_category(), "simgpu: " + path);
  }
  void* mapped = mmap(nullptr, sizeof(Table), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (mapped == MAP_FAILED) {
    throw std::system_error(errno, std::generic_category(), "simgpu: mmap of " + path);
  }
  table_ = static_cast<Table*>(mapped);
  place_ = table_->taken.fetch_add(1);
  if (place_ >= kPlaces) {
    throw std::runtime_error("simgpu: " + path + " has been used by 64 processes: set SIMGPU_DIR " +
                             "to a directory of its own for each job");
  }
  table_->places[static_cast<size_t>(place_)].process = getpid();
}

Job::~Job() { munmap(table_, sizeof(Table)); }

void Job::SayBlocked(const std::vector<uint64_t>& missing, const std::string& words) {
  Place& mine = table_->places[static_cast<size_t>(place_)];
  const size_t count = std::min(missing.size(), static_cast<size_t>(kMeetings));
  for (size_t i = 0; i < count; ++i) mine.missing[i] = missing[i];
  mine.meetings = static_cast<uint32_t>(count);
  const size_t length = std::min(words.size(), mine.words.size() - 1);
  std::memcpy(mine.words.data(), words.data(), length);
  mine.words[length] = 0;
  mine.turn |= 1;
}

void Job::SayGoesOn() {
  Place& mine = table_->places[static_cast<size_t>(place_)];
  if ((mine.turn & 1) != 0) ++mine.turn;
}

Job::Look Job::LookForDeadlock() const {
  uint64_t blocked = 0, ended = 0;
  Look look;
  const int taken = std::min<int>(table_->taken, kPlaces);
  for (int i = 0; i < taken; ++i) {
    const auto at = static_cast<size_t>(i);
    look.turns[at] = table_->places[at].turn;
    if ((look.turns[at] & 1) != 0) blocked |= uint64_t{1} << i;
    const int process = table_->places[at].process;
    if (process != 0 && HasEnded(process)) ended |= uint64_t{1} << i;
  }
  blocked &= ~ended;
  for (bool changed = true; changed;) {
    changed = false;
    for (int i = 0; i < taken; ++i) {
      if ((blocked >> i & 1) == 0) continue;
      const Place& place = table_->places[static_cast<size_t>(i)];
      for (uint32_t m = 0; m < place.meetings; ++m) {
        if ((place.missing[m] & (blocked | ended)) != 0) continue;
        blocked &= ~(uint64_t{1} << i);  // those it waits for may still come
        changed = true;
        break;
      }
    }
  }
  look.places = (blocked >> place_ & 1) != 0 ? blocked : 0;
  for (int i = 0; i < kPlaces; ++i) {
    if ((look.places >> i & 1) == 0) look.turns[static_cast<size_t>(i)] = 0;
  }
  return look;
}

std::string Job::WordsOf(uint64_t places) const {
  std::string out;
  for (uint64_t rest = places; rest != 0; rest &= rest - 1) {
    const Place& place = table_->places[static_cast<size_t>(std::countr_zero(rest))];
    out += "  process " + std::to_string(place.process) + ":\n" + place.words.data();
  }
  return out;
}

}  // namespace simgpu
