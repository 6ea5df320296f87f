#include "simgpu/core/race_detector.h"

#include <algorithm>
#include <iterator>
#include <sstream>

#include "simgpu/core/findings.h"

namespace simgpu {

void RaceDetector::Touch(const std::string& name, int stream, uint32_t time, uint64_t issue,
                         const std::shared_ptr<const Clock>& clock,
                         const std::vector<Access>& accesses) {
  const Toucher by{stream, time, NumberOf(name), issue, clock};
  // Reads first: an operation that works in place reads what others wrote before it writes.
  for (const bool writes : {false, true}) {
    for (const Access& access : accesses) {
      if (access.writes != writes || access.first >= access.last) continue;
      Split(access.first);
      Split(access.last);
      Compare(access, by);
      writes ? TakeWrite(access, by) : TakeRead(access, by);
    }
  }
}

void RaceDetector::Forget(uintptr_t first, uintptr_t last) {
  Split(first);
  Split(last);
  cells_.erase(cells_.lower_bound(first), cells_.lower_bound(last));
}

/// No cell reaches over `where` afterwards.
void RaceDetector::Split(uintptr_t where) {
  auto at = cells_.upper_bound(where);
  if (at == cells_.begin()) return;
  --at;
  if (at->first >= where || at->second.last <= where) return;
  Cell right = at->second;
  at->second.last = where;
  cells_.emplace(where, std::move(right));
}

void RaceDetector::Compare(const Access& access, const Toucher& by) {
  // Either may be the earlier one: what a table in device memory names is known late.
  const auto ordered = [&](const Toucher& other) {
    return other.stream < 0 || other.stream == by.stream ||
           by.clock->Knows(other.stream, other.time) || other.clock->Knows(by.stream, by.time);
  };
  for (auto at = cells_.lower_bound(access.first); at != cells_.end() && at->first < access.last;
       ++at) {
    const Cell& cell = at->second;
    if (!ordered(cell.write)) {
      Report(cell.write, true, by, access.writes, at->first, cell.last);
    }
    if (!access.writes) continue;
    for (const Toucher& read : cell.reads) {
      if (!ordered(read)) Report(read, false, by, true, at->first, cell.last);
    }
  }
}

void RaceDetector::TakeWrite(const Access& access, const Toucher& by) {
  cells_.erase(cells_.lower_bound(access.first), cells_.lower_bound(access.last));
  cells_.emplace(access.first, Cell{access.last, by, {}});
}

void RaceDetector::TakeRead(const Access& access, const Toucher& by) {
  auto at = cells_.lower_bound(access.first);
  for (uintptr_t place = access.first; place < access.last; ++at) {
    if (at == cells_.end() || at->first > place) {  // bytes that nobody has touched yet
      const uintptr_t last = at == cells_.end() ? access.last : std::min(access.last, at->first);
      at = cells_.emplace_hint(at, place, Cell{last, {}, {}});
    }
    auto& reads = at->second.reads;
    const auto same = [&](const Toucher& read) { return read.stream == by.stream; };
    const auto mine = std::find_if(reads.begin(), reads.end(), same);
    mine == reads.end() ? reads.push_back(by) : void(*mine = by);
    place = at->second.last;
  }
}

void RaceDetector::Report(const Toucher& before, bool before_writes, const Toucher& now,
                          bool now_writes, uintptr_t first, uintptr_t last) {
  const std::string& one = names_[before.name];
  const std::string& other = names_[now.name];
  std::ostringstream text;
  text << (now_writes ? "write" : "read") << " by '" << other << "' (stream " << now.stream
       << ", operation " << now.issue << ") is not ordered after the "
       << (before_writes ? "write" : "read") << " by '" << one << "' (stream " << before.stream
       << ", operation " << before.issue << ") of " << last - first << " bytes at 0x" << std::hex
       << first;
  Findings::Get().Add(Fault::kRace, one + "|" + other, text.str());
}

uint32_t RaceDetector::NumberOf(const std::string& name) {
  const auto [at, is_new] = number_of_.emplace(name, static_cast<uint32_t>(names_.size()));
  if (is_new) names_.push_back(name);
  return at->second;
}

}  // namespace simgpu
