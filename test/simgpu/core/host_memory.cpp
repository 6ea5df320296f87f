#include "simgpu/core/host_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <set>
#include <sstream>

#include "simgpu/core/findings.h"

namespace simgpu {
namespace {

uintptr_t PageSize() {
  static const auto size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  return size;
}
uintptr_t Down(uintptr_t address) { return address / PageSize() * PageSize(); }
uintptr_t Up(uintptr_t address) { return Down(address + PageSize() - 1); }

}  // namespace

void* HostMemory::Allocate(size_t bytes) {
  const std::lock_guard lock(mutex_);
  const size_t whole = Up(std::max<size_t>(bytes, 1));
  if (pinned_ + whole > limit_) return nullptr;
  void* ptr = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (ptr == MAP_FAILED) return nullptr;
  pinned_ += whole;
  blocks_[reinterpret_cast<uintptr_t>(ptr)] = {whole, true};
  return ptr;
}

bool HostMemory::Free(void* ptr) {
  const std::lock_guard lock(mutex_);
  const auto at = blocks_.find(reinterpret_cast<uintptr_t>(ptr));
  if (at == blocks_.end() || !at->second.own) return false;
  pinned_ -= at->second.bytes;
  munmap(ptr, at->second.bytes);
  blocks_.erase(at);
  return true;
}

bool HostMemory::Register(void* ptr, size_t bytes) {
  const std::lock_guard lock(mutex_);
  const auto first = reinterpret_cast<uintptr_t>(ptr);
  if (pinned_ + bytes > limit_ || Overlaps(first, first + bytes)) return false;
  pinned_ += bytes;
  blocks_[first] = {bytes, false};
  return true;
}

bool HostMemory::Unregister(void* ptr) {
  const std::lock_guard lock(mutex_);
  const auto at = blocks_.find(reinterpret_cast<uintptr_t>(ptr));
  if (at == blocks_.end() || at->second.own) return false;
  pinned_ -= at->second.bytes;
  blocks_.erase(at);
  return true;
}

bool HostMemory::IsPinned(const void* ptr) const {
  const std::lock_guard lock(mutex_);
  const auto address = reinterpret_cast<uintptr_t>(ptr);
  return Overlaps(address, address + 1);
}

bool HostMemory::AreTogether(const void* ptr, size_t bytes) const {
  const std::lock_guard lock(mutex_);
  const auto first = reinterpret_cast<uintptr_t>(ptr);
  const auto behind = blocks_.upper_bound(first);
  if (behind != blocks_.end() && behind->first < first + bytes) return false;
  if (behind == blocks_.begin()) return true;
  const auto& [begin, block] = *std::prev(behind);
  const uintptr_t end = begin + block.bytes;
  return end <= first || end >= first + bytes;
}

bool HostMemory::Overlaps(uintptr_t first, uintptr_t last) const {
  auto at = blocks_.lower_bound(first);
  if (at != blocks_.end() && at->first < last) return true;
  return at != blocks_.begin() && std::prev(at)->first + std::prev(at)->second.bytes > first;
}

void HostMemory::Guard(uintptr_t first, uintptr_t last, bool writes, int stream, uint32_t time,
                       const std::string& name) {
  const std::lock_guard lock(mutex_);
  guarded_.push_back({first, last, writes, stream, time, name});
  Protect(Down(first), Up(last));
}

void HostMemory::Release(const Clock& host) {
  const std::lock_guard lock(mutex_);
  std::vector<Guarded> over;
  std::erase_if(guarded_, [&](const Guarded& g) {
    if (!host.Knows(g.stream, g.time)) return false;
    over.push_back(g);
    return true;
  });
  for (const Guarded& g : over) Protect(Down(g.first), Up(g.last));
}

HostMemory::Opened::Opened(HostMemory& memory, uintptr_t first, uintptr_t last)
    : memory_(memory), first_(Down(first)), last_(Up(last)) {
  const std::lock_guard lock(memory_.mutex_);
  memory_.opened_.emplace(first_, last_);
  memory_.Protect(first_, last_);
}

HostMemory::Opened::~Opened() {
  const std::lock_guard lock(memory_.mutex_);
  const auto [begin, end] = memory_.opened_.equal_range(first_);
  memory_.opened_.erase(std::find_if(begin, end, [&](auto& o) { return o.second == last_; }));
  memory_.Protect(first_, last_);
}

bool HostMemory::TakeFault(void* address) {
  const std::lock_guard lock(mutex_);
  const auto at = reinterpret_cast<uintptr_t>(address);
  std::vector<Guarded> taken;
  std::erase_if(guarded_, [&](const Guarded& g) {
    if (at < Down(g.first) || at >= Up(g.last)) return false;
    taken.push_back(g);
    return true;
  });
  for (const Guarded& g : taken) {
    Protect(Down(g.first), Up(g.last));
    if (at < g.first || at >= g.last) continue;  // a neighbour on the page
    std::ostringstream text;
    text << "the host touched 0x" << std::hex << at << std::dec << ", pinned memory that '"
         << g.name << "' (stream " << g.stream << ") may still be "
         << (g.writes ? "writing" : "reading");
    Findings::Get().Add(Fault::kHostTooEarly, g.name, text.str());
  }
  return !taken.empty();
}

int HostMemory::AccessOf(uintptr_t page) const {
  for (const auto& [first, last] : opened_) {
    if (page >= first && page < last) return PROT_READ | PROT_WRITE;
  }
  int access = PROT_READ | PROT_WRITE;
  for (const Guarded& g : guarded_) {
    if (page < Up(g.last) && page >= Down(g.first)) access &= g.writes ? PROT_NONE : PROT_READ;
  }
  return access;
}

/// Gives each page the access that the operations allow which the device may still be at.
void HostMemory::Protect(uintptr_t first_page, uintptr_t last_page) {
  std::set<uintptr_t> edges = {first_page, last_page};  // between them all pages are alike
  const auto add = [&](uintptr_t page) {
    if (page > first_page && page < last_page) edges.insert(page);
  };
  for (const Guarded& g : guarded_) {
    add(Down(g.first));
    add(Up(g.last));
  }
  for (const auto& [first, last] : opened_) {
    add(first);
    add(last);
  }
  for (auto at = edges.begin(); std::next(at) != edges.end(); ++at) {
    const uintptr_t last = *std::next(at);
    mprotect(reinterpret_cast<void*>(*at), last - *at, AccessOf(*at));
  }
}

}  // namespace simgpu
