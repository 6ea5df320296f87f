#include "hsdp/departures.h"

#include <ATen/ATen.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>
#include <vector>

#include "catch2.h"
#include "fake_units.h"
#include "hsdp/pending_works.h"

namespace hsdp = hsdp_ckpt::hsdp;

namespace {

using fake_units::ErrorOf;
using hsdp::Departures;
using hsdp::Joint;
using hsdp::JointOp;

// A message whose other side is never there.
class Message : public c10d::Work {
 public:
  explicit Message(at::Tensor tensor) : Work(-1, c10d::OpType::RECV), tensor_(std::move(tensor)) {}

  bool wait(std::chrono::milliseconds) override {
    std::unique_lock lock(mutex_);
    given_up_.wait(lock, [this] { return is_given_up_; });
    return false;
  }
  void abort() override {
    const std::lock_guard lock(mutex_);
    is_given_up_ = true;
    given_up_.notify_one();
  }

 private:
  const at::Tensor tensor_;
  std::mutex mutex_;
  std::condition_variable given_up_;
  bool is_given_up_ = false;
};

class SilentBackend : public c10d::Backend {
 public:
  explicit SilentBackend(int rank) : Backend(rank, 2) {}

  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  WorkPtr send(std::vector<at::Tensor>& tensors, int, int) override { return Post(tensors); }
  WorkPtr recv(std::vector<at::Tensor>& tensors, int, int) override { return Post(tensors); }

 private:
  static WorkPtr Post(const std::vector<at::Tensor>& tensors) {
    return c10::make_intrusive<Message>(tensors.at(0));
  }
};

// The groups that two ranks of one job have of each other, in one process.
class TwoRanks {
 public:
  TwoRanks() {
    const auto store = c10::make_intrusive<c10d::HashStore>();
    for (int rank = 0; rank < 2; ++rank) {
      const std::string name = "peers of " + std::to_string(rank);
      groups_.push_back(c10::make_intrusive<c10d::ProcessGroup>(store, rank, 2));
      groups_.back()->setBackend(at::kCPU, c10d::ProcessGroup::BackendType::CUSTOM,
                                 c10::make_intrusive<SilentBackend>(rank));
      c10d::register_process_group(name, groups_.back());
      ranks_.push_back(Departures::Make(name, /*channel=*/3));
    }
  }
  ~TwoRanks() { EndGroups(); }
  TwoRanks(const TwoRanks&) = delete;
  TwoRanks& operator=(const TwoRanks&) = delete;

  void EndGroups() {
    const size_t count = std::exchange(groups_, {}).size();
    for (size_t rank = 0; rank < count; ++rank) {
      c10d::unregister_process_group("peers of " + std::to_string(rank));
    }
  }

  const std::shared_ptr<Departures>& operator[](size_t rank) const { return ranks_.at(rank); }
  const hsdp::GroupPtr& group(size_t rank) const { return groups_.at(rank); }

 private:
  std::vector<hsdp::GroupPtr> groups_;
  std::vector<std::shared_ptr<Departures>> ranks_;
};

}  // namespace

TEST_CASE("only what a rank has not begun before it left is waited for in vain", "[schedule]") {
  const TwoRanks ranks;
  ranks[1]->Begin(Joint::kGather);
  ranks[1]->Begin(Joint::kGather);
  ranks[1]->Begin(Joint::kReduction);
  const JointOp next{Joint::kGather, 3, 0};
  CHECK(ranks[0]->WhyInVain(next).empty());

  ranks[1]->Leave("rank 1 has left, at last");
  ranks[1]->Leave("a second reason");
  CHECK(ranks[1]->left());
  CHECK_FALSE(ranks[0]->left());
  CHECK(ranks[0]->WhyInVain({Joint::kGather, 2, 0}).empty());
  CHECK(ranks[0]->WhyInVain(next) == "rank 1 has left, at last");
  CHECK(ranks[0]->WhyInVain({Joint::kReduction, 1, 0}).empty());
  CHECK(ranks[0]->WhyInVain({Joint::kReduction, 2, 0}) == "rank 1 has left, at last");
  CHECK(ranks[0]->WhyInVain({Joint::kQuestion, 1, 0}) == "rank 1 has left, at last");

  CHECK(ranks[1]->has_raised());

  // Who follows says how far it has come too.
  ranks[0]->Follow("rank 1 has left, at last");
  CHECK_FALSE(ranks[0]->has_raised());
  CHECK(ranks[1]->WhyInVain({Joint::kGather, 1, 0}) == "rank 1 has left, at last");
}

TEST_CASE("ranks that have met go on from the same counts under another tag", "[schedule]") {
  const TwoRanks ranks;
  const int64_t tag = ranks[0]->tag(0);
  CHECK(ranks[1]->tag(0) == tag);
  ranks[1]->Leave("rank 1 has left");
  ranks[0]->Begin(Joint::kGather);
  ranks[0]->Leave("rank 1 has left");
  for (size_t rank : {0, 1}) {
    ranks[rank]->EnterRound();
    ranks[rank]->GoOn({1, 0, 0});
    CHECK_FALSE(ranks[rank]->left());
    CHECK(ranks[rank]->tag(1) > tag);
  }

  const JointOp op = ranks[1]->Begin(Joint::kGather);
  CHECK(op.number == 2);
  CHECK(op.round == 1);
  CHECK(ranks[1]->WhyInVain(op).empty());
}

TEST_CASE("a rank leaves with all of its roots", "[schedule]") {
  const TwoRanks ranks;
  const auto other_here = Departures::Make("peers of 0", /*channel=*/4);
  const auto other_there = Departures::Make("peers of 1", /*channel=*/4);
  ranks[1]->Leave("rank 1 has left");
  CHECK(other_there->left());
  CHECK_FALSE(other_here->left());
  CHECK(other_here->WhyInVain(other_here->Begin(Joint::kGather)) == "rank 1 has left");
}

TEST_CASE("without its group a rank leaves silently", "[schedule]") {
  TwoRanks ranks;
  ranks.EndGroups();
  CHECK_NOTHROW(ranks[0]->Leave("rank 0 has left"));
  CHECK(ranks[1]->WhyInVain({Joint::kGather, 1, 0}).empty());
}

TEST_CASE("who waits in vain for a rank that has left is told, and leaves too", "[schedule]") {
  const TwoRanks ranks;
  const at::Tensor memory = at::zeros({4});
  hsdp::PendingWorks works(ranks[0], ranks[0]->Begin(Joint::kGather));
  works.Send(memory, ranks.group(0), /*peer=*/1);
  works.Receive(memory, ranks.group(0), /*peer=*/1);
  ranks[1]->Leave("rank 1 has left");
  CHECK(ErrorOf([&] { works.Wait(); }).starts_with("given up, as rank 1 has left"));
  CHECK(works.empty());
  CHECK(ranks[0]->left());
  // Peers may still write to what was given up.
  CHECK(memory.use_count() > 1);
}

TEST_CASE("messages that nobody has waited for keep their memory", "[schedule]") {
  const TwoRanks ranks;
  const at::Tensor memory = at::zeros({4}), other = at::zeros({4});
  {
    hsdp::PendingWorks works(ranks[0], ranks[0]->Begin(Joint::kGather));
    works.Receive(memory, ranks.group(0), /*peer=*/1);
    works = hsdp::PendingWorks(ranks[0], ranks[0]->Begin(Joint::kGather));
    works.Receive(other, ranks.group(0), /*peer=*/1);
  }
  CHECK(memory.use_count() > 1);
  CHECK(other.use_count() > 1);
}
