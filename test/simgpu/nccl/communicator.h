#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "simgpu/core/operation.h"
#include "simgpu/nccl/collective.h"
#include "simgpu/nccl/mailbox.h"

namespace simgpu {

/// Ranks in several processes, or in one, that call collectives together: a collective takes place
/// when every rank's stream has come to it, one after another in the order of the calls.
class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  /// Waits for all ranks; raises std::runtime_error that names who has not come within a minute.
  static std::shared_ptr<Communicator> Open(const std::string& id, int rank, int size, int device);

  /// Queues the calls of a group on a stream, as one operation.
  void Launch(int stream, std::vector<Call> calls);

  /// The ranks of `color` in the order of their keys; null for a negative color. All ranks call it.
  std::shared_ptr<Communicator> Split(int color, int key);

  /// What is queued ends without effect; the others learn of it.
  void Abort();
  /// Who has aborted, or has ended without closing, while a group is under way here; -1: nobody.
  /// Idle connections do not show it.
  int lost_rank() const;

  int rank() const { return rank_; }
  int size() const { return size_; }
  int device() const { return device_; }

 private:
  class Group;  // a group of calls under way

  Communicator(std::string id, int rank, int size, int device);
  /// For reports: the same number in all processes, and who this is in it.
  std::string Name() const;
  std::vector<std::string> Exchange(const std::string& what, const std::string& mine);

  const std::string id_;
  const int rank_, size_, device_;
  const int64_t number_;  // among those of this process
  const Mailbox mailbox_;
  std::vector<int> places_, processes_;  // by rank
  uint64_t groups_ = 0, splits_ = 0;
  std::map<int, uint64_t> sends_, receives_;  // by peer
  std::deque<std::string> own_messages_;      // that peers may still read
  std::atomic<int> under_way_ = 0;            // groups
  std::atomic<bool> aborted_ = false;
};

}  // namespace simgpu
