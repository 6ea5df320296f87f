#include "hsdp/pending_works.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <c10/util/ScopeExit.h>
#include <c10/util/thread_name.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <list>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

namespace hsdp_ckpt::hsdp {
namespace {

using Clock = std::chrono::steady_clock;

// Most waits are over long before.
constexpr auto kMoment = std::chrono::milliseconds(500);
// Far longer than a message takes whose two sides are there.
constexpr auto kLongest = std::chrono::minutes(5);

// The dispatcher's operators have one schema in torch 2.11 to 2.15; the methods of ProcessGroup
// were renamed in between.
using MessageOp = WorkPtr(at::TensorList, const GroupPtr&, int64_t, int64_t);

/// Somebody who waits for messages.
struct Waiting {
  const std::vector<WorkPtr>& works;
  const Departures& departures;
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

  void Add(Waiting& waiting) {
    const std::lock_guard lock(mutex_);
    waiting_.push_back(&waiting);
    quiet_looks_ = 0;
    if (asleep_) somebody_waits_.notify_one();
  }

  // Not while the thread looks at it.
  void Remove(Waiting& waiting) {
    std::unique_lock lock(mutex_);
    looked_.wait(lock, [&] { return looking_at_ != &waiting; });
    waiting_.remove(&waiting);
  }

 private:
  Watch() {
    std::thread([this] {
      c10::setThreadName("hsdp_watch");
      for (;;) {
        AwaitSomebody();
        std::this_thread::sleep_for(kMoment);
        LookAtAll();
      }
    }).detach();
  }

  // The thread falls asleep only when nobody has come for a while, as waking it costs who comes.
  void AwaitSomebody() {
    std::unique_lock lock(mutex_);
    if (!waiting_.empty() || ++quiet_looks_ < kQuietLooks) return;
    asleep_ = true;
    somebody_waits_.wait(lock, [this] { return !waiting_.empty(); });
    asleep_ = false;
  }

  void LookAtAll() {
    std::unique_lock lock(mutex_);
    const std::vector<Waiting*> all(waiting_.begin(), waiting_.end());
    for (Waiting* waiting : all) {
      const bool still = std::find(waiting_.begin(), waiting_.end(), waiting) != waiting_.end();
      if (!still || !waiting->why_in_vain.empty() || Clock::now() - waiting->since < kMoment)
        continue;
      looking_at_ = waiting;
      lock.unlock();  // the store may take its time
      const std::string why = waiting->departures.WhyInVain(waiting->op);
      lock.lock();
      if (!why.empty()) GiveUp(*waiting, why);
      looking_at_ = nullptr;
      looked_.notify_all();
    }
  }

  static void GiveUp(Waiting& waiting, const std::string& why) {
    waiting.why_in_vain = why;
    for (const WorkPtr& work : waiting.works) work->abort();
  }

  static constexpr int kQuietLooks = 10;

  std::mutex mutex_;
  std::condition_variable somebody_waits_, looked_;
  std::list<Waiting*> waiting_;
  const Waiting* looking_at_ = nullptr;
  int quiet_looks_ = 0;
  bool asleep_ = false;
};

/// Works that were put aside.
class Abandoned {
 public:
  static Abandoned& OfProcess() {
    static auto& abandoned = *new Abandoned();  // peers may answer until the process ends
    return abandoned;
  }

  void Take(std::vector<WorkPtr> works) {
    std::deque<Entry> over;  // destroyed without the lock
    const std::lock_guard lock(mutex_);
    const Clock::time_point now = Clock::now();
    while (!kept_.empty() && now - kept_.front().since > kLongest) {
      over.push_back(std::move(kept_.front()));
      kept_.pop_front();
    }
    kept_.push_back({now, std::move(works)});
  }

 private:
  struct Entry {
    Clock::time_point since;
    std::vector<WorkPtr> works;
  };

  std::mutex mutex_;
  std::deque<Entry> kept_;
};

}  // namespace

PendingWorks::~PendingWorks() {
  if (!works_.empty()) Abandoned::OfProcess().Take(std::move(works_));
}

PendingWorks& PendingWorks::operator=(PendingWorks&& other) noexcept {
  // What this one held is the other's to put aside.
  std::swap(works_, other.works_);
  std::swap(departures_, other.departures_);
  std::swap(op_, other.op_);
  return *this;
}

void PendingWorks::Send(const at::Tensor& tensor, const GroupPtr& group, int64_t peer) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("c10d::send", "").typed<MessageOp>();
  if (tensor.numel() > 0) works_.push_back(op.call({tensor}, group, peer, tag()));
}

void PendingWorks::Receive(const at::Tensor& tensor, const GroupPtr& group, int64_t peer) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("c10d::recv_", "").typed<MessageOp>();
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
  waited.works_.clear();
}

void PendingWorks::WaitForMessages() const {
  Waiting waiting{works_, *departures_, op_};
  Watch::OfProcess().Add(waiting);
  auto over = c10::make_scope_exit([&] { Watch::OfProcess().Remove(waiting); });
  const bool all =
      std::all_of(works_.begin(), works_.end(), [](const WorkPtr& work) { return work->wait(); });
  if (all) return;
  over.release();
  Watch::OfProcess().Remove(waiting);
  departures_->Leave(waiting.why_in_vain);
  TORCH_CHECK_WITH(DistBackendError, false, "given up, as ", waiting.why_in_vain,
                   ". All ranks leave this step, and can go on with the next one");
}

}  // namespace hsdp_ckpt::hsdp
