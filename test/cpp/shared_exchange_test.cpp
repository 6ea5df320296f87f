// Processes that share what they read: here threads of one, each with its own mapping of the
// memory.
#include "checkpoint/load/shared_exchange.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <numeric>
#include <thread>

#include "base/error.h"
#include "checkpoint/save/shard_file_writer.h"
#include "fault_file_system.h"

namespace hsdp_ckpt {
namespace {

constexpr int kMembers = 3;

class SharedExchangeTest : public testing::Test {
 protected:
  SharedExchangeTest() : values_(5 << 20) {
    std::iota(values_.begin(), values_.end(), 0);
    const format::DataFileName name{0, 1, {1, 2, 3, 4}, false, 0};
    fs_.MakeDirectory("/job");
    fs_.MakeDirectory("/job/step");
    checkpoint::ShardFileWriter writer(fs_, "/job/step", name, {.threads = 1});
    const checkpoint::RecordSource source{"w",
                                          format::FindRecordDtype("int32"),
                                          {static_cast<int64_t>(values_.size())},
                                          std::as_bytes(std::span(values_))};
    place_ = writer.Write({&source, 1})[0];
    writer.Finish();
    files_.push_back(
        std::make_unique<checkpoint::ShardFileReader>(fs_, "/job/step", name.ToString()));
  }

  std::unique_ptr<checkpoint::ReadPlan> PlanInto(std::vector<int32_t>& target) {
    target.assign(values_.size(), 0);
    const auto bytes = std::as_writable_bytes(std::span(target));
    return std::make_unique<checkpoint::ReadPlan>(
        files_,
        std::vector<checkpoint::PlannedRead>{{0,
                                              {"w", place_.offset, place_.length, 0,
                                               static_cast<int64_t>(bytes.size()), bytes.data()}}});
  }

  FaultFileSystem fs_;
  std::vector<int32_t> values_;
  decltype(std::declval<checkpoint::ShardFileWriter&>().Write({}))::value_type place_{};
  std::vector<std::unique_ptr<checkpoint::ShardFileReader>> files_;
};

TEST_F(SharedExchangeTest, EveryMemberGetsAllAndEveryByteIsReadOnce) {
  std::vector<checkpoint::SharedExchange> members;
  members.push_back(checkpoint::SharedExchange::Create(kMembers));
  for (int m = 1; m < kMembers; ++m)
    members.push_back(checkpoint::SharedExchange::Join(members[0].path(), m, kMembers));
  for (int round = 0; round < 2; ++round) {
    std::vector<std::vector<int32_t>> targets(kMembers);
    std::vector<std::unique_ptr<checkpoint::ReadPlan>> plans;
    for (auto& target : targets) plans.push_back(PlanInto(target));
    {
      std::vector<std::jthread> threads;
      for (size_t m = 0; m < kMembers; ++m)
        threads.emplace_back([&, m] { members[m].Run(*plans[m], 2, 60); });
    }
    int64_t read = 0;
    for (size_t m = 0; m < kMembers; ++m) {
      EXPECT_EQ(targets[m], values_) << "member " << m;
      read += plans[m]->bytes_read();
    }
    EXPECT_NEAR(static_cast<double>(read), static_cast<double>(plans[0]->bytes()),
                64 * checkpoint::ReadPlan::kPage);
  }
}

TEST_F(SharedExchangeTest, AMemberThatHasEndedIsNoticedBeforeItsParentKnows) {
  checkpoint::SharedExchange first = checkpoint::SharedExchange::Create(2);
  const pid_t child = ::fork();
  if (child == 0) {
    const checkpoint::SharedExchange second = checkpoint::SharedExchange::Join(first.path(), 1, 2);
    ::_exit(0);
  }
  siginfo_t info{};
  ASSERT_EQ(::waitid(P_PID, static_cast<id_t>(child), &info, WEXITED | WNOWAIT),
            0);  // it stays a zombie
  std::vector<int32_t> target;
  const auto plan = PlanInto(target);
  try {
    first.Run(*plan, 2, 60);
    FAIL() << "nobody has read the other half";
  } catch (const base::Error& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("has died"));
  }
  ::waitpid(child, nullptr, 0);
}

TEST_F(SharedExchangeTest, AMemberThatDoesNotGoOnIsAnErrorAfterTheTimeout) {
  checkpoint::SharedExchange first = checkpoint::SharedExchange::Create(2);
  checkpoint::SharedExchange second =
      checkpoint::SharedExchange::Join(first.path(), 1, 2);  // alive, and never runs
  std::vector<int32_t> target;
  const auto plan = PlanInto(target);
  try {
    first.Run(*plan, 2, 0.2);
    FAIL() << "nobody has read the other half";
  } catch (const base::Error& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("has not gone on for"));
  }
  const auto other = PlanInto(target);
  EXPECT_THROW(second.Run(*other, 2, 60), base::Error) << "the first has failed";
  EXPECT_TRUE(second.peer_failed());
}

}  // namespace
}  // namespace hsdp_ckpt
