#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>
#include <vector>

#include "hsdp/departures.h"

namespace hsdp_ckpt::hsdp {

using WorkPtr = c10::intrusive_ptr<c10d::Work>;
using GroupPtr = c10::intrusive_ptr<c10d::ProcessGroup>;

/// What has been sent and is not known to be over: the works of one operation, which this object
/// owns. What streams order counts as over: its work, if the backend gives one, is only kept for
/// the streams that have to wait for it.
///
/// Works that nobody has waited for must not be destroyed while peers may still answer them: Gloo
/// stops to read from a connection, for good, when the receiver of what arrives is gone. So they
/// are put aside, with the memory that peers write to, for some minutes: a message that both sides
/// have posted is over within moments, and one that a peer never posts needs nobody.
///
/// Thread safety: none, but for what is put aside.
class PendingWorks {
 public:
  PendingWorks() = default;
  /// Of a collective of `group`; may be null. Its wait ends with it or with the group's timeout.
  PendingWorks(WorkPtr work, const GroupPtr& group);
  /// Of an operation on the current stream; `work` may be null.
  static PendingWorks OnStream(WorkPtr work);
  /// Of messages between two ranks each, which are given up when a rank has left the step without
  /// having begun `op` (Departures). Without departures there are no peers that might.
  PendingWorks(std::shared_ptr<Departures> departures, const JointOp& op)
      : departures_(std::move(departures)), op_(op) {}
  ~PendingWorks();
  PendingWorks(PendingWorks&& other) noexcept = default;
  PendingWorks& operator=(PendingWorks&& other) noexcept;

  /// Posts a message between two ranks of `group`: nothing for a tensor without elements. `peer`:
  /// the other one's number in the group.
  void Send(const at::Tensor& tensor, const GroupPtr& group, int64_t peer);
  void Receive(const at::Tensor& tensor, const GroupPtr& group, int64_t peer);

  bool empty() const { return works_.empty(); }
  /// The work of an operation on a stream, if there is one, put behind `works`.
  void MoveQueuedTo(std::vector<WorkPtr>& works) {
    if (WorkPtr work = std::exchange(queued_, {})) works.push_back(std::move(work));
  }
  /// For what comes behind that operation in any case.
  void ForgetQueued() { queued_.reset(); }
  /// Whether all of them are over. Of messages nobody knows until they are waited for.
  bool AreOver() const;
  /// Waits for all, in their order, and forgets them. The first failure is thrown at once, as the
  /// work throws it; c10::DistBackendError if they are given up, in which case this rank has left
  /// the step.
  void Wait();

 private:
  void WaitForMessages() const;
  int64_t tag() const { return departures_ ? departures_->tag(op_.round) : Departures::kFirstTag; }

  std::vector<WorkPtr> works_;
  WorkPtr queued_;                          // on a stream
  std::shared_ptr<const void> use_;         // of a collective's group, while it is not over
  std::shared_ptr<Departures> departures_;  // null for collectives, and without peers
  JointOp op_{};
};

/// Keeps the group of this name until the process ends if a collective of it is not over: its
/// destructor would wait for peers that may never come. It can't do so in another thread either:
/// that one needs Python's lock in the end, and where the interpreter has gone meanwhile it takes
/// the process down.
void KeepIfPending(const std::string& name);

}  // namespace hsdp_ckpt::hsdp
