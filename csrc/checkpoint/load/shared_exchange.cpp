#include "checkpoint/load/shared_exchange.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <ctime>
#include <limits>

#include "base/error.h"
#include "base/parallel.h"

namespace hsdp_ckpt::checkpoint {
namespace {

constexpr uint32_t kMaxSlots = 4;
// All members' slots together take at most this: they count as every member's memory.
constexpr int64_t kMemory = int64_t{40} << 20;

uint32_t SlotsFor(int members) {
  const int64_t fit = kMemory / (members * ReadPlan::kBufferBytes);
  return static_cast<uint32_t>(std::clamp<int64_t>(fit, 1, kMaxSlots));
}

std::atomic_ref<uint32_t> Atomic(uint32_t& word) { return std::atomic_ref<uint32_t>(word); }

// std::atomic's own wait works within one process only.
void FutexWait(uint32_t* word, uint32_t seen) {
  const timespec moment{0, 100'000'000};
  ::syscall(SYS_futex, word, FUTEX_WAIT, seen, &moment, nullptr, 0);
}
void FutexWake(uint32_t* word) {
  ::syscall(SYS_futex, word, FUTEX_WAKE, std::numeric_limits<int>::max(), nullptr, nullptr, 0);
}

bool HasEnded(pid_t process) {
  if (::kill(process, 0) != 0 && errno == ESRCH) return true;
  // A process that nobody has waited for yet still takes signals; a descriptor of it tells.
  const int fd = static_cast<int>(::syscall(SYS_pidfd_open, process, 0));
  if (fd < 0) return false;
  pollfd ended{fd, POLLIN, 0};
  const bool has_ended = ::poll(&ended, 1, 0) > 0;
  ::close(fd);
  return has_ended;
}

}  // namespace

/// At the start of the shared memory; zeros at first. Rounds count up over all plans, and so do the
/// words.
struct SharedExchange::Header {
  uint32_t failed;  // 1 + the member that did
  int32_t pids[kMaxMembers];
  struct {
    uint32_t ready;  // 1 + the round whose extent is in it
    uint32_t taken;  // how often it has been taken, by whichever member
  } slots[kMaxMembers][kMaxSlots];
};

SharedExchange::SharedExchange(int fd, int member, int members)
    : fd_(fd), member_(member), members_(members), slots_(SlotsFor(members)) {
  void* memory = ::mmap(nullptr, Bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) {
    const int error = errno;
    ::close(fd);
    throw base::IoError("mmap", "memory shared with other ranks", -1, error);
  }
  header_ = static_cast<Header*>(memory);
  __atomic_store_n(&header_->pids[member], static_cast<int32_t>(::getpid()), __ATOMIC_SEQ_CST);
}

SharedExchange SharedExchange::Create(int members) {
  const int fd = ::memfd_create("torch_hsdp_ckpt", MFD_CLOEXEC);
  if (fd < 0) throw base::IoError("memfd_create", "memory shared with other ranks", -1, errno);
  const auto bytes = static_cast<off_t>(ReadPlan::kPage + static_cast<int64_t>(SlotsFor(members)) *
                                                              members * ReadPlan::kBufferBytes);
  // All of it now: memory that is not there at the first write would end the process.
  if (const int error = ::posix_fallocate(fd, 0, bytes); error != 0) {
    ::close(fd);
    throw base::IoError("posix_fallocate", "memory shared with other ranks", bytes, error);
  }
  return SharedExchange(fd, 0, members);
}

SharedExchange SharedExchange::Join(const std::string& path, int member, int members) {
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) throw base::IoError("open", path, -1, errno);
  return SharedExchange(fd, member, members);
}

SharedExchange::SharedExchange(SharedExchange&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)),
      member_(other.member_),
      members_(other.members_),
      slots_(other.slots_),
      rounds_(other.rounds_),
      header_(std::exchange(other.header_, nullptr)),
      timeout_(other.timeout_),
      peer_failed_(other.peer_failed_) {}

SharedExchange::~SharedExchange() {
  if (header_ != nullptr) ::munmap(header_, Bytes());
  if (fd_ >= 0) ::close(fd_);
}

std::string SharedExchange::path() const {
  return "/proc/" + std::to_string(::getpid()) + "/fd/" + std::to_string(fd_);
}

size_t SharedExchange::Bytes() const {
  return static_cast<size_t>(ReadPlan::kPage +
                             static_cast<int64_t>(slots_) * members_ * ReadPlan::kBufferBytes);
}

std::byte* SharedExchange::Slot(int member, uint32_t slot) const {
  static_assert(sizeof(Header) <= ReadPlan::kPage);
  const int64_t number = static_cast<int64_t>(member) * slots_ + slot;
  return reinterpret_cast<std::byte*>(header_) + ReadPlan::kPage + number * ReadPlan::kBufferBytes;
}

void SharedExchange::Abort() {
  uint32_t none = 0;
  Atomic(header_->failed).compare_exchange_strong(none, static_cast<uint32_t>(member_) + 1);
}

// Until `reached` says so of the word's value. Looks up ten times a second for what no wake tells
// of.
template <typename Reached>
void SharedExchange::Wait(uint32_t* word, int peer, const Reached& reached) {
  const auto start = std::chrono::steady_clock::now();
  for (;;) {
    const uint32_t value = Atomic(*word).load(std::memory_order_acquire);
    if (reached(value)) return;
    FutexWait(word, value);
    if (const uint32_t failed = Atomic(header_->failed).load(); failed != 0) {
      if (failed != static_cast<uint32_t>(member_) + 1) peer_failed_ = true;
      throw base::Error("another rank that reads the same files on this host has failed");
    }
    for (int m = 0; m < members_; ++m) {
      if (m == member_ || (peer >= 0 && m != peer)) continue;
      if (HasEnded(header_->pids[m])) {
        throw base::Error("process " + std::to_string(header_->pids[m]) +
                          ", a rank that reads the same files on this host, has died");
      }
    }
    if (std::chrono::steady_clock::now() - start > std::chrono::duration<double>(timeout_)) {
      const std::string who =
          peer < 0 ? "another process" : "process " + std::to_string(header_->pids[peer]);
      throw base::Error(who +
                        ", a rank that reads the same files on this host, has not gone on for " +
                        std::to_string(static_cast<int64_t>(timeout_)) +
                        " s: it was stopped, or its storage does not answer");
    }
  }
}

namespace {

// Each member's extents are neighbours in the files: [first, last).
std::pair<size_t, size_t> Share(size_t extents, int member, int members) {
  const auto m = static_cast<size_t>(member), all = static_cast<size_t>(members);
  return {extents * m / all, extents * (m + 1) / all};
}

}  // namespace

void SharedExchange::Produce(ReadPlan& plan, uint32_t round, uint32_t base) {
  const auto [first, last] = Share(plan.extents().size(), member_, members_);
  const uint32_t all = base + round, slot = all % slots_;
  auto& state = header_->slots[member_][slot];
  // As often as it has been filled before, by every other member.
  const uint32_t taken = all / slots_ * static_cast<uint32_t>(members_ - 1);
  Wait(&state.taken, -1, [&](uint32_t value) { return value == taken; });
  if (first + round < last) plan.Fill(first + round, Slot(member_, slot));
  Atomic(state.ready).store(all + 1, std::memory_order_release);
  FutexWake(&state.ready);
}

void SharedExchange::Consume(ReadPlan& plan, uint32_t round, uint32_t base) {
  const uint32_t all = base + round, slot = all % slots_;
  for (int step = 1; step < members_; ++step) {
    const int peer = (member_ + step) % members_;
    const auto [first, last] = Share(plan.extents().size(), peer, members_);
    auto& state = header_->slots[peer][slot];
    Wait(&state.ready, peer, [&](uint32_t value) { return value == all + 1; });
    if (first + round < last) plan.Deliver(first + round, Slot(peer, slot));
    Atomic(state.taken).fetch_add(1, std::memory_order_acq_rel);
    FutexWake(&state.taken);
  }
}

void SharedExchange::Run(ReadPlan& plan, int threads, double timeout) {
  timeout_ = timeout;
  size_t rounds = 0;
  for (int m = 0; m < members_; ++m) {
    const auto [first, last] = Share(plan.extents().size(), m, members_);
    rounds = std::max(rounds, last - first);
  }
  const uint32_t base = rounds_;
  rounds_ += static_cast<uint32_t>(rounds);
  try {
    // In this order nobody waits for what comes later, in any member: filling a slot waits for
    // rounds before it to be taken, taking waits for the same round to be filled.
    base::ParallelFor(2 * rounds, threads, [&](size_t job) {
      const auto round = static_cast<uint32_t>(job / 2);
      job % 2 == 0 ? Produce(plan, round, base) : Consume(plan, round, base);
    });
    plan.Finish();
  } catch (...) {
    Abort();
    throw;
  }
}

}  // namespace hsdp_ckpt::checkpoint
