// Two saves into one directory, one stopped at any of its calls while the other runs: never both,
// never a mixture, and the one that began last is the directory's.
#include "checkpoint/commit/claim.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/bytes.h"
#include "base/error.h"
#include "checkpoint/commit/commit.h"
#include "checkpoint/commit/leftovers.h"
#include "fault_file_system.h"
#include "io/file.h"
#include "pickle_bytes.h"

namespace hsdp_ckpt {
namespace {

const std::string kDirectory = "/d";

checkpoint::Liveness EverybodyRuns(const format::ProcessIdentity&, int64_t) {
  return checkpoint::Liveness::kRunning;
}
checkpoint::Liveness EverybodyIsDead(const format::ProcessIdentity&, int64_t) {
  return checkpoint::Liveness::kDead;
}

checkpoint::Liveness NobodyIsSeen(const format::ProcessIdentity&, int64_t) {
  return checkpoint::Liveness::kUnknown;
}

format::DataFileName DataOf(uint64_t save) {
  return {0, save, {1, 2, static_cast<int64_t>(save), 4}, false, 0};
}

// A save of one file. Its metadata and its data file hold the save's number.
void Save(io::FileSystem& fs, uint64_t save, const std::vector<uint64_t>& older = {},
          const checkpoint::OwnerLiveness& liveness = EverybodyRuns) {
  const std::string name = DataOf(save).ToString();
  const std::string text = pickle_bytes::Texts({std::to_string(save), name});
  const std::string claim =
      checkpoint::ClaimDirectory(fs, kDirectory, ".metadata", save, /*overwrite=*/true);
  checkpoint::RemoveLeftovers(fs, kDirectory, ".metadata", claim, {}, true, liveness);
  io::File file = io::File::Open(fs, io::JoinPath(kDirectory, name), io::OpenMode::kCreate);
  file.WriteAt(base::AsBytes(text), 0);
  file.Close();
  checkpoint::CommitRequest request{kDirectory,
                                    ".metadata",
                                    claim,
                                    base::AsBytes(text),
                                    {{name, static_cast<int64_t>(text.size())}},
                                    {},
                                    true};
  for (const uint64_t each : older) request.superseded.push_back(DataOf(each).ToString());
  checkpoint::Commit(fs, request, liveness);
}

// The save that loads; 0 if there is none. What its metadata names has to be there.
uint64_t Load(FaultFileSystem& fs) {
  const auto* metadata = fs.Bytes(kDirectory + "/.metadata");
  if (metadata == nullptr) return 0;
  const std::string text(metadata->begin(), metadata->end());
  const uint64_t save = std::stoull(pickle_bytes::TextsIn(text).at(0));
  const auto* data = fs.Bytes(kDirectory + "/" + DataOf(save).ToString());
  if (data == nullptr || std::string(data->begin(), data->end()) != text)
    throw base::Error("save " + std::to_string(save) + " has no data");
  return save;
}

std::vector<std::string> Claims(io::FileSystem& fs) {
  std::vector<std::string> claims;
  for (const auto& name : io::ListDirectory(fs, kDirectory)) {
    if (checkpoint::ParseClaim(name)) claims.push_back(name);
  }
  return claims;
}

class Stopped : public testing::TestWithParam<std::pair<uint64_t, uint64_t>> {
 protected:
  // Save `first` runs and is stopped before its call `at`, where save `second` runs from beginning
  // to end. Whether the first one returned; `reached` is false when it has fewer calls.
  bool RunBoth(FaultFileSystem& fs, int at, const checkpoint::OwnerLiveness& liveness,
               std::string* op, bool* second_done) {
    const auto [first, second] = GetParam();
    Save(fs, 1);
    fs.set_fault([&, this](const std::string& call_op, const std::string&, int call) {
      if (call != at) return 0;
      *op = call_op;
      fs.set_fault(nullptr);
      try {
        Save(fs, GetParam().second, {1, GetParam().first}, liveness);
        *second_done = true;
      } catch (const base::Error&) {
      }
      return 0;
    });
    bool done = true;
    try {
      Save(fs, first, {1}, liveness);
    } catch (const base::Error&) {
      done = false;
    }
    fs.set_fault(nullptr);
    return done;
  }
};

TEST_P(Stopped, AtEveryCallWhileAnotherSaveCommits) {
  const auto [first, second] = GetParam();
  std::set<uint64_t> found;
  for (const auto& liveness : {EverybodyRuns, EverybodyIsDead, NobodyIsSeen}) {
    for (int at = 0;; ++at) {
      FaultFileSystem fs;
      fs.MakeDirectory(kDirectory);
      std::string op;
      bool second_done = false;
      const bool first_done = RunBoth(fs, at, liveness, &op, &second_done);
      if (op.empty()) break;
      const uint64_t loaded = Load(fs);
      found.insert(loaded);
      const auto where = "stopped before call " + std::to_string(at) + ", " + op;
      EXPECT_TRUE(first_done || second_done) << where;
      EXPECT_EQ(loaded, second_done && (!first_done || loaded == second) ? second : first) << where;
      EXPECT_THAT(Claims(fs), testing::IsEmpty()) << where;
      // Stopped once it has claimed, the first one is only there if it had committed by then.
      if (op == "rename") {
        EXPECT_FALSE(first_done);
        EXPECT_EQ(loaded, second);
      }
    }
  }
  EXPECT_TRUE(found.contains(second));
}

// The order of save ids decides only between claims of the same number.
INSTANTIATE_TEST_SUITE_P(BothOrders, Stopped, testing::Values(std::pair{5, 7}, std::pair{7, 5}));

TEST(ClaimTest, AnEarlierSaveThatWakesIsToldSo) {
  FaultFileSystem fs;
  fs.MakeDirectory(kDirectory);
  fs.set_fault([&](const std::string& op, const std::string&, int) {
    if (op == "rename") {
      fs.set_fault(nullptr);
      Save(fs, 2);
    }
    return 0;
  });
  try {
    Save(fs, 1);
    FAIL();
  } catch (const base::Error& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("has taken it over; this one is not committed"));
  }
  EXPECT_EQ(Load(fs), 2u);
  EXPECT_EQ(fs.Bytes(kDirectory + "/" + DataOf(1).ToString()), nullptr);
}

TEST(ClaimTest, ClaimsOfDeadSavesGoAndNumbersGrow) {
  FaultFileSystem fs;
  fs.MakeDirectory(kDirectory);
  const std::string first = checkpoint::ClaimDirectory(fs, kDirectory, ".metadata", 9, true);
  const std::string other_metadata =
      checkpoint::ClaimDirectory(fs, kDirectory, "__3.metadata", 9, true);
  const std::string second = checkpoint::ClaimDirectory(fs, kDirectory, ".metadata", 8, true);
  EXPECT_THAT(Claims(fs), testing::UnorderedElementsAre(other_metadata, second));
  EXPECT_EQ(checkpoint::ParseClaim(first)->writer.number + 1,
            checkpoint::ParseClaim(second)->writer.number);
  EXPECT_EQ(checkpoint::ParseClaim(other_metadata)->metadata_name, "__3.metadata");
  checkpoint::ReleaseClaim(fs, kDirectory, second);
  checkpoint::ReleaseClaim(fs, kDirectory, second);
  EXPECT_THAT(Claims(fs), testing::ElementsAre(other_metadata));
  for (const char* bad : {".metadata.tmp", ".metadata", "x.tmp", ".metadata__0_0.distcp.tmp"}) {
    EXPECT_FALSE(checkpoint::ParseClaim(bad)) << bad;
  }
}

TEST(ClaimTest, WithoutOverwriteACheckpointIsRefusedAndNothingIsLeft) {
  FaultFileSystem fs;
  fs.MakeDirectory(kDirectory);
  Save(fs, 1);
  checkpoint::ClaimDirectory(fs, kDirectory, ".metadata", 3,
                             /*overwrite=*/true);  // under way: it keeps its claim
  const auto before = io::ListDirectory(fs, kDirectory);
  EXPECT_THROW(checkpoint::ClaimDirectory(fs, kDirectory, ".metadata", 2, /*overwrite=*/false),
               base::Error);
  EXPECT_EQ(io::ListDirectory(fs, kDirectory), before);
}

TEST(ClaimTest, EveryFailingCallIsReportedAndLeavesNoClaimItCanRemove) {
  for (int at = 0, done = 0; done == 0; ++at) {
    FaultFileSystem fs;
    fs.MakeDirectory(kDirectory);
    checkpoint::ClaimDirectory(fs, kDirectory, ".metadata", 1, true);
    bool reached = false;
    fs.set_fault([&](const std::string&, const std::string&, int call) {
      reached = reached || call == at;
      return call == at ? -EACCES : 0;
    });
    bool threw = false;
    try {
      checkpoint::ClaimDirectory(fs, kDirectory, ".metadata", 2, false);
    } catch (const base::IoError& error) {
      threw = true;
      EXPECT_EQ(error.error_number(), EACCES);
    }
    done = reached ? 0 : 1;
    EXPECT_EQ(threw, reached);
    fs.set_fault(nullptr);
    EXPECT_LE(Claims(fs).size(), 1u) << at;
  }
}

// A data file of a save that may still commit stays, even when its rank has ended; without a claim
// it goes. The file's save id is not the claim's where a planner caches plans.
TEST(ClaimTest, FilesOfASaveUnderWayStay) {
  struct Case {
    uint64_t claimed;
    const char* metadata;
    bool stays;
  };
  // The last one's files are of another rank than this one.
  for (const auto& [claimed, metadata, stays] :
       {Case{0, "", false}, Case{50, ".metadata", true}, Case{51, ".metadata", true},
        Case{51, "__0.metadata", true}, Case{51, "__7.metadata", false}}) {
    FaultFileSystem fs;
    fs.MakeDirectory(kDirectory);
    const std::string name = DataOf(50).ToString();
    bool begun = false;
    // Between the first save's rename and its clean-up.
    fs.set_fault([&, claimed = claimed, metadata = metadata](const std::string& op,
                                                             const std::string&, int) {
      if (op != "fsync directory" || begun) return 0;
      begun = true;
      if (claimed != 0) checkpoint::ClaimDirectory(fs, kDirectory, metadata, claimed, true);
      io::File::Open(fs, io::JoinPath(kDirectory, name), io::OpenMode::kCreate).Close();
      return 0;
    });
    Save(fs, 1, {}, [](const format::ProcessIdentity& owner, int64_t) {
      return owner.pid == 50 ? checkpoint::Liveness::kDead : checkpoint::Liveness::kRunning;
    });
    EXPECT_TRUE(begun);
    EXPECT_EQ(fs.Bytes(kDirectory + "/" + name) != nullptr, stays) << claimed << metadata;
  }
}

}  // namespace
}  // namespace hsdp_ckpt
