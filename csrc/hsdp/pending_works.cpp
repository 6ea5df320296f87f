#include "hsdp/pending_works.h"

#include <c10/util/Exception.h>
#include <c10/util/ScopeExit.h>
#include <c10/util/thread_name.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <utility>

#include "hsdp/c10d_ops.h"

namespace hsdp_ckpt::hsdp {
namespace {

using Clock = std::chrono::steady_clock;

// Most waits are over long before.
constexpr auto kMoment = std::chrono::milliseconds(500);
// Far longer than a message takes whose two sides are there.
constexpr auto kLongest = std::chrono::minutes(5);

using MessageOp = WorkPtr(at::TensorList, const GroupPtr&, int64_t, int64_t);

/// Works that were put aside.
class Abandoned {
 public:
  static Abandoned& OfProcess() {
    static auto& abandoned = *new Abandoned();  // peers may answer until the process ends
    return abandoned;
  }

  void Take(std::vector<WorkPtr> works, std::shared_ptr<const void> use) {
    const std::lock_guard lock(mutex_);
    kept_.push_back({Clock::now(), std::move(works), std::move(use)});
  }

  void DropOld() {
    std::deque<Entry> old;  // destroyed without the lock
    const std::lock_guard lock(mutex_);
    for (; !kept_.empty() && Clock::now() - kept_.front().since > kLongest; kept_.pop_front())
      old.push_back(std::move(kept_.front()));
  }

 private:
  struct Entry {
    Clock::time_point since;
    std::vector<WorkPtr> works;
    std::shared_ptr<const void> use;
  };

  std::mutex mutex_;
  std::deque<Entry> kept_;
};

/// Knows which groups have collectives that are not over.
class GroupUses {
 public:
  static GroupUses& OfProcess() {
    static auto& uses = *new GroupUses();  // collectives may be under way until the process ends
    return uses;
  }

  /// What a collective holds until it is over.
  std::shared_ptr<const void> Add(const GroupPtr& group) {
    const std::lock_guard lock(mutex_);
    std::weak_ptr<const void>& known = uses_[group.get()];
    std::shared_ptr<const void> use = known.lock();
    if (!use) known = use = std::make_shared<int>();
    return use;
  }

  /// Forgets a group that has none; says whether that is so.
  bool Forget(const GroupPtr& group) {
    const std::lock_guard lock(mutex_);
    const auto found = uses_.find(group.get());
    if (found == uses_.end()) return true;
    if (!found->second.expired()) return false;
    uses_.erase(found);
    return true;
  }

 private:
  std::mutex mutex_;
  std::map<const c10d::ProcessGroup*, std::weak_ptr<const void>> uses_;
};

/// Somebody who waits for messages.
struct Waiting {
  const std::vector<WorkPtr>& works;
  const std::shared_ptr<Departures> departures;
  const JointOp op;
  const Clock::time_point since = Clock::now();
  std::string why_in_vain{};
};

/// Knows who waits for messages, and looks from time to time whether somebody does in vain. A
/// message is over only for who waits for it, and only another thread can end that wait.
class Watch {
 public:
  static Watch& OfProcess() {
    // It is never destroyed, as its thread is never joined.
    static auto& watch = *new Watch();
    return watch;
  }

  int64_t Add(Waiting& waiting) {
    const std::lock_guard lock(mutex_);
    waiting_.emplace(++last_, &waiting);
    return last_;
  }

  void Remove(int64_t number) {
    const std::lock_guard lock(mutex_);
    waiting_.erase(number);
  }

 private:
  struct Impatient {
    int64_t number;
    std::shared_ptr<Departures> departures;
    JointOp op;
  };

  Watch() {
    std::thread([this] {
      c10::setThreadName("hsdp_watch");
      for (;;) {
        std::this_thread::sleep_for(kMoment);
        for (const Impatient& one : AllImpatient()) {
          // The store may take its time: nobody waits for it.
          const std::string why = one.departures->WhyInVain(one.op);
          if (!why.empty()) GiveUp(one.number, why);
        }
        Abandoned::OfProcess().DropOld();
      }
    }).detach();
  }

  std::vector<Impatient> AllImpatient() {
    const std::lock_guard lock(mutex_);
    std::vector<Impatient> all;
    for (const auto& [number, waiting] : waiting_) {
      if (waiting->why_in_vain.empty() && Clock::now() - waiting->since > kMoment)
        all.push_back({number, waiting->departures, waiting->op});
    }
    return all;
  }

  void GiveUp(int64_t number, const std::string& why) {
    const std::lock_guard lock(mutex_);
    const auto at = waiting_.find(number);
    if (at == waiting_.end()) return;
    at->second->why_in_vain = why;
    for (const WorkPtr& work : at->second->works) work->abort();
  }

  std::mutex mutex_;
  std::map<int64_t, Waiting*> waiting_;
  int64_t last_ = 0;
};

}  // namespace

PendingWorks::PendingWorks(WorkPtr work, const GroupPtr& group)
    : works_{std::move(work)}, use_(GroupUses::OfProcess().Add(group)) {}

PendingWorks PendingWorks::OnStream(WorkPtr work) {
  PendingWorks works;
  works.queued_ = std::move(work);
  return works;
}

PendingWorks::~PendingWorks() {
  if (works_.empty()) return;
  if (AreOver()) use_.reset();
  Abandoned::OfProcess().Take(std::move(works_), std::move(use_));
}

PendingWorks& PendingWorks::operator=(PendingWorks&& other) noexcept {
  // What this one held is the other's to put aside.
  std::swap(works_, other.works_);
  std::swap(queued_, other.queued_);
  std::swap(use_, other.use_);
  std::swap(departures_, other.departures_);
  std::swap(op_, other.op_);
  return *this;
}

void PendingWorks::Send(const at::Tensor& tensor, const GroupPtr& group, int64_t peer) {
  static const auto op = FindOp<MessageOp>("c10d::send");
  if (tensor.numel() > 0) works_.push_back(op.call({tensor}, group, peer, tag()));
}

void PendingWorks::Receive(const at::Tensor& tensor, const GroupPtr& group, int64_t peer) {
  static const auto op = FindOp<MessageOp>("c10d::recv_");
  if (tensor.numel() > 0) works_.push_back(op.call({tensor}, group, peer, tag()));
}

bool PendingWorks::AreOver() const {
  return std::all_of(works_.begin(), works_.end(),
                     [](const WorkPtr& work) { return !work || work->isCompleted(); });
}

void PendingWorks::Wait() {
  PendingWorks waited = std::move(*this);  // what is not over when this throws is put aside
  if (waited.departures_) {
    waited.WaitForMessages();
  } else {
    for (const WorkPtr& work : waited.works_) {
      if (work) work->wait();
    }
  }
  if (waited.queued_) waited.queued_->wait();
  waited.works_.clear();
}

void PendingWorks::WaitForMessages() const {
  Waiting waiting{works_, departures_, op_};
  const int64_t number = Watch::OfProcess().Add(waiting);
  auto over = c10::make_scope_exit([&] { Watch::OfProcess().Remove(number); });
  const bool all =
      std::all_of(works_.begin(), works_.end(), [](const WorkPtr& work) { return work->wait(); });
  if (all) return;
  over.release();
  Watch::OfProcess().Remove(number);
  departures_->Follow(waiting.why_in_vain);
  TORCH_CHECK_WITH(DistBackendError, false, "given up, as ", waiting.why_in_vain,
                   ". All ranks leave this step, and can go on with the next one");
}

void KeepIfPending(const std::string& name) {
  const GroupPtr group = c10d::resolve_process_group(name);
  if (!GroupUses::OfProcess().Forget(group)) new GroupPtr(group);
}

}  // namespace hsdp_ckpt::hsdp
