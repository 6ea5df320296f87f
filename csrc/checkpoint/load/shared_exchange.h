#pragma once

#include <cstdint>
#include <string>

#include "checkpoint/load/read_plan.h"

namespace hsdp_ckpt::checkpoint {

/// Processes of one host that read the same plan: each reads its part of the extents from storage,
/// into shared memory, and takes the rest from there. Every byte is read and checked by one of
/// them.
///
/// The memory is anonymous (memfd), so nothing is left behind by a process that dies. Each member
/// has a few slots, in which its extents follow each other; a slot is filled again when all members
/// have taken what was in it. An error of one member, or its death, is an Error in all of them
/// within a fraction of a second. Not thread-safe; Run starts the threads.
class SharedExchange {
 public:
  static constexpr int kMaxMembers = 16;
  /// The creator is member 0, and lasts until the others have joined. Throws IoError where there is
  /// no memory.
  static SharedExchange Create(int members);
  /// `path`: what the creator's `path()` says.
  static SharedExchange Join(const std::string& path, int member, int members);
  ~SharedExchange();
  SharedExchange(SharedExchange&& other) noexcept;
  SharedExchange& operator=(SharedExchange&&) = delete;

  std::string path() const;
  /// Reads and delivers all of `plan`, which has the same extents in every member. All members call
  /// it, with the same plans in one order. Throws Error where one member does not go on for
  /// `timeout` seconds.
  void Run(ReadPlan& plan, int threads, double timeout);
  /// Tells the others that this member will not come (any more).
  void Abort();
  /// Whether Run failed because of another member, whose own error says why.
  bool peer_failed() const { return peer_failed_; }

 private:
  struct Header;
  SharedExchange(int fd, int member, int members);
  void Produce(ReadPlan& plan, uint32_t round, uint32_t base);
  void Consume(ReadPlan& plan, uint32_t round, uint32_t base);
  template <typename Reached>
  void Wait(uint32_t* word, int peer, const Reached& reached);
  std::byte* Slot(int member, uint32_t slot) const;
  size_t Bytes() const;

  int fd_ = -1;
  int member_ = 0;
  int members_ = 1;
  uint32_t slots_ = 1;
  uint32_t rounds_ = 0;  // of all plans so far
  Header* header_ = nullptr;
  double timeout_ = 0;  // seconds
  bool peer_failed_ = false;
};

}  // namespace hsdp_ckpt::checkpoint
