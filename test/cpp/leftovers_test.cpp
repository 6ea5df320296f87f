// What makes room before a save, and what stays, by what can be known of the process that wrote it.
#include "checkpoint/commit/leftovers.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/bytes.h"
#include "checkpoint/commit/claim.h"
#include "fault_file_system.h"
#include "io/file.h"
#include "pickle_bytes.h"

namespace hsdp_ckpt {
namespace {

using checkpoint::Liveness;

const std::string kDirectory = "/d";
constexpr uint64_t kClaimed = 0x3e9c1a1,
                   kUnclaimed = 0x3e90001;  // odd, as an older version drew it
constexpr int64_t kNow = 1'000'000'000;

// By the process id in the names.
Liveness ByPid(const format::ProcessIdentity& owner, int64_t) {
  return static_cast<Liveness>(owner.pid);
}

std::string NameOf(Liveness liveness, uint64_t save_id, int64_t rank = 0) {
  return format::DataFileName{rank, save_id, {1, 2, static_cast<int64_t>(liveness), 4}, false, 0}
      .ToString();
}

void Write(FaultFileSystem& fs, const std::string& name, const std::string& text = "") {
  io::File file = io::File::Open(fs, io::JoinPath(kDirectory, name), io::OpenMode::kCreate);
  file.WriteAt(base::AsBytes(text), 0);
  file.Close();
}

class LeftoversTest : public testing::Test {
 protected:
  LeftoversTest() {
    fs_.MakeDirectory(kDirectory);
    claim_ = checkpoint::ClaimDirectory(fs_, kDirectory, ".metadata", 7, true);
    fs_.modified[kDirectory + "/" + claim_] = kNow;
  }

  // A file that was last written so many seconds before the claim was made.
  void WriteAgo(int64_t seconds, const std::string& name, const std::string& text = "") {
    Write(fs_, name, text);
    fs_.modified[kDirectory + "/" + name] = kNow - seconds;
  }
  std::vector<std::string> Removed() {
    return checkpoint::RemoveLeftovers(fs_, kDirectory, ".metadata", claim_, {}, true, ByPid)
        .removed;
  }

  FaultFileSystem fs_;
  std::string claim_;
};

TEST_F(LeftoversTest, OfDeadProcessesGoAndOfRunningOnesStay) {
  for (const uint64_t id : {kClaimed, kUnclaimed}) {
    WriteAgo(0, NameOf(Liveness::kDead, id));
    WriteAgo(2 * checkpoint::kLeaseSeconds, NameOf(Liveness::kRunning, id));
  }
  Write(fs_, "notes.txt");
  Write(fs_, "__0_0.distcp");
  EXPECT_THAT(Removed(), testing::UnorderedElementsAre(NameOf(Liveness::kDead, kClaimed),
                                                       NameOf(Liveness::kDead, kUnclaimed)));
}

TEST_F(LeftoversTest, OfProcessesThatNobodySeesGoByTheClaimOrByTheLease) {
  WriteAgo(0, NameOf(Liveness::kUnknown, kClaimed));
  WriteAgo(checkpoint::kLeaseSeconds, NameOf(Liveness::kUnknown, kUnclaimed, 1));
  WriteAgo(checkpoint::kLeaseSeconds + 1, NameOf(Liveness::kUnknown, kUnclaimed, 2));
  EXPECT_THAT(Removed(), testing::UnorderedElementsAre(NameOf(Liveness::kUnknown, kClaimed),
                                                       NameOf(Liveness::kUnknown, kUnclaimed, 2)));
}

TEST_F(LeftoversTest, WhatAMetadataNamesStays) {
  const std::string named = NameOf(Liveness::kDead, kClaimed);
  const std::string others = NameOf(Liveness::kDead, kClaimed, 3);
  const std::string dead = NameOf(Liveness::kDead, kClaimed, 4);
  for (const std::string& name : {named, others, dead}) Write(fs_, name);
  Write(fs_, ".metadata", pickle_bytes::Texts({"storage_data", named}));
  Write(fs_, "__3.metadata", "may name files of rank 3");
  EXPECT_THAT(Removed(), testing::ElementsAre(dead));
}

TEST_F(LeftoversTest, NothingGoesWhereTheMetadataCantBeReadOrTheClaimIsLost) {
  const std::string dead = NameOf(Liveness::kDead, kClaimed);
  Write(fs_, dead);
  Write(fs_, ".metadata", "no pickle");
  EXPECT_THROW(Removed(), base::Error);
  fs_.Remove(kDirectory + "/.metadata");
  fs_.Remove(kDirectory + "/" + claim_);
  EXPECT_THAT(Removed(), testing::IsEmpty());
  EXPECT_NE(fs_.Bytes(kDirectory + "/" + dead), nullptr);
}

TEST_F(LeftoversTest, AClaimThatNobodyTakesOverKeepsItsFilesForTheLease) {
  const std::string claim =
      "__0.metadata" + NameOf(Liveness::kUnknown, kClaimed) + ".tmp";  // rank 0's own
  const std::string data = NameOf(Liveness::kUnknown, kClaimed);
  WriteAgo(checkpoint::kLeaseSeconds, claim);
  WriteAgo(0, data);
  EXPECT_THAT(Removed(), testing::IsEmpty());
  fs_.modified[kDirectory + "/" + claim] -= 1;
  EXPECT_THAT(Removed(), testing::ElementsAre(data));
}

}  // namespace
}  // namespace hsdp_ckpt
