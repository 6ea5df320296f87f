// Power loss and failures at every call of a save over an older checkpoint: the directory must hold
// a complete checkpoint.
#include "checkpoint/commit/commit.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <sstream>

#include "base/bytes.h"
#include "base/error.h"
#include "checkpoint/commit/claim.h"
#include "checkpoint/commit/process_identity.h"
#include "checkpoint/load/read_plan.h"
#include "checkpoint/save/shard_file_writer.h"
#include "fault_file_system.h"
#include "io/file.h"

namespace hsdp_ckpt {
namespace {

constexpr int kRanks = 2;
const std::string kDirectory = "/job/step";

std::vector<float> Values(int generation, int rank) {
  std::mt19937 random(static_cast<unsigned>(generation * 10 + rank));
  std::vector<float> out(5000 + static_cast<size_t>(rank));
  for (float& value : out) value = static_cast<float>(random());
  return out;
}

format::DataFileName NameOf(int generation, int rank) {
  return {rank, static_cast<uint64_t>(generation), {1, 2, 100 + generation, 4}, false, 0};
}

bool NobodyIsDead(const format::ProcessIdentity&, int64_t) { return false; }

std::string Claim(io::FileSystem& fs, const std::string& metadata_name, uint64_t save_id) {
  return checkpoint::ClaimDirectory(fs, kDirectory, metadata_name, save_id, /*overwrite=*/true);
}

// A whole save: what every rank does up to its vote, then the coordinator. The "metadata" names
// files and records.
checkpoint::CommitResult Save(io::FileSystem& fs, int generation,
                              const std::vector<std::string>& superseded,
                              const checkpoint::OwnerIsDead& dead = NobodyIsDead) {
  checkpoint::CommitRequest request;
  request.directory = kDirectory;
  request.metadata_name = ".metadata";
  request.superseded = superseded;
  std::ostringstream metadata;
  metadata << generation << "\n";
  io::MakeDirectories(fs, kDirectory, true);
  request.claim = Claim(fs, ".metadata", static_cast<uint64_t>(generation));
  for (int rank = 0; rank < kRanks; ++rank) {
    const auto values = Values(generation, rank);
    checkpoint::ShardFileWriter writer(fs, kDirectory, NameOf(generation, rank),
                                       {.threads = 1, .reserve = 1000, .block = 8192});
    const checkpoint::RecordSource source{"w",
                                          format::FindRecordDtype("float32"),
                                          {static_cast<int64_t>(values.size())},
                                          std::as_bytes(std::span(values))};
    const auto places = writer.Write({&source, 1});
    const auto written = writer.Finish();
    io::SyncDirectory(fs, kDirectory);
    request.files.push_back({NameOf(generation, rank).ToString(), written.size});
    metadata << request.files.back().name << " " << places[0].offset << " " << places[0].length
             << "\n";
  }
  const std::string text = metadata.str();
  request.metadata = base::AsBytes(text);
  return checkpoint::Commit(fs, request, dead);
}

// Which generation loads, bit for bit; -1 if there is no metadata. Anything in between throws.
int Load(FaultFileSystem& fs) {
  const auto* metadata = fs.Bytes(kDirectory + "/.metadata");
  if (metadata == nullptr) return -1;
  std::istringstream in(std::string(metadata->begin(), metadata->end()));
  int generation = -2;
  in >> generation;
  for (int rank = 0; rank < kRanks; ++rank) {
    std::string name;
    int64_t offset = 0, length = 0;
    in >> name >> offset >> length;
    std::vector<std::unique_ptr<checkpoint::ShardFileReader>> files;
    files.push_back(std::make_unique<checkpoint::ShardFileReader>(fs, kDirectory, name));
    std::vector<float> values(Values(generation, rank).size());
    const auto bytes = std::as_writable_bytes(std::span(values));
    checkpoint::ReadPlan(
        files, {{0, {"w", offset, length, 0, static_cast<int64_t>(bytes.size()), bytes.data()}}})
        .ReadAll(1);
    if (values != Values(generation, rank)) throw base::Error("other values");
  }
  return generation;
}

std::vector<std::string> Names(int generation) {
  std::vector<std::string> out;
  for (int rank = 0; rank < kRanks; ++rank) out.push_back(NameOf(generation, rank).ToString());
  return out;
}

using testing::Contains;
using testing::Not;
using testing::UnorderedElementsAre;

// From call `at` on nothing reaches the disk any more, cleaning up neither.
void LosePowerAt(FaultFileSystem& fs, int at, bool* survived) {
  fs.set_fault([at, survived](const std::string&, const std::string&, int call) {
    if (call < at) return 0;
    *survived = false;
    return -EIO;
  });
}

class PowerLossTest : public testing::TestWithParam<FaultFileSystem::Loss> {};

TEST_P(PowerLossTest, AtEveryCallOfASaveOverAnotherLeavesOneOfTheTwo) {
  std::set<int> found;
  bool done = false;
  for (int at = 0; !done; ++at) {
    FaultFileSystem fs;
    fs.MakeDirectory("/");
    Save(fs, 1, {});
    done = true;
    LosePowerAt(fs, at, &done);
    int acknowledged = 1;
    try {
      Save(fs, 2, Names(1));
      acknowledged = 2;
    } catch (const base::IoError&) {
    }
    fs.set_fault(nullptr);
    fs.PowerLoss(GetParam());
    const int loaded = Load(fs);
    found.insert(loaded);
    EXPECT_TRUE(loaded == 1 || loaded == 2) << "power lost at call " << at;
    EXPECT_GE(loaded, acknowledged) << "a save that returned is gone";
  }
  EXPECT_THAT(found, UnorderedElementsAre(1, 2));
}

TEST_P(PowerLossTest, OfAFirstSaveLeavesNothingOrAll) {
  std::set<int> found;
  bool done = false;
  for (int at = 0; !done; ++at) {
    FaultFileSystem fs;
    fs.MakeDirectory("/");
    done = true;
    LosePowerAt(fs, at, &done);
    int acknowledged = -1;
    try {
      Save(fs, 1, {});
      acknowledged = 1;
    } catch (const base::IoError&) {
    }
    fs.set_fault(nullptr);
    fs.PowerLoss(GetParam());
    const int loaded = Load(fs);
    found.insert(loaded);
    EXPECT_GE(loaded, acknowledged) << "a save that returned is gone: power lost at call " << at;
  }
  EXPECT_THAT(found, UnorderedElementsAre(-1, 1));
}

// A save that died may have made any of the directories, and not synced the last one's parent.
TEST_P(PowerLossTest, InADirectoryThatADeadSaveHasMade) {
  for (int at = 0;; ++at) {
    FaultFileSystem fs;
    fs.MakeDirectory("/");
    bool alive = true;
    LosePowerAt(fs, at, &alive);  // a process that is killed does no more either
    try {
      io::MakeDirectories(fs, kDirectory, true);
    } catch (const base::IoError&) {
    }
    fs.set_fault(nullptr);
    Save(fs, 1, {});
    fs.PowerLoss(GetParam());
    EXPECT_EQ(Load(fs), 1) << "the save before died at call " << at;
    if (alive) break;
  }
}

// `/` above a mount point: perhaps not ours to read, on a read-only or a synthetic file system.
TEST(CommitTest, TheParentOfADirectoryThatIsThereNeedsSyncingOnlyWhereItCanBe) {
  for (const int error : {EACCES, EROFS, EINVAL, EIO}) {
    FaultFileSystem fs;
    fs.MakeDirectory("/");
    io::MakeDirectories(fs, kDirectory, true);
    int synced = 0;
    fs.set_fault([&](const std::string& op, const std::string& path, int) {
      if (op != "fsync directory" || path != "/job") return 0;
      ++synced;
      return -error;
    });
    if (error == EIO) {
      EXPECT_THROW(io::MakeDirectories(fs, kDirectory, true), base::IoError);
    } else {
      EXPECT_NO_THROW(io::MakeDirectories(fs, kDirectory, true)) << error;
    }
    EXPECT_EQ(synced, 1);
  }
}

INSTANTIATE_TEST_SUITE_P(All, PowerLossTest,
                         testing::Values(FaultFileSystem::Loss::kEverything,
                                         FaultFileSystem::Loss::kOnlyBytes,
                                         FaultFileSystem::Loss::kOnlyEntries,
                                         FaultFileSystem::Loss::kEveryOtherPage));

TEST(CommitTest, EveryFailingCallIsReportedAndKeepsACompleteCheckpoint) {
  for (const int error : {ENOSPC, EIO, EROFS, EACCES}) {
    bool done = false;
    for (int at = 0; !done; ++at) {
      FaultFileSystem fs;
      fs.MakeDirectory("/");
      Save(fs, 1, {});
      std::string failed;
      fs.set_fault([&](const std::string& op, const std::string&, int call) {
        if (call != at) return 0;
        failed = op;
        return -error;
      });
      bool threw = false;
      checkpoint::CommitResult result;
      try {
        result = Save(fs, 2, Names(1));
      } catch (const base::IoError& got) {
        threw = true;
        EXPECT_EQ(got.error_number(), error) << failed;
      }
      done = failed.empty();
      fs.set_fault(nullptr);
      const int loaded = Load(fs);
      // What fails after the commit is said in the result, not thrown; a failed cleanup never fails
      // a save.
      if (threw) {
        EXPECT_TRUE(loaded == 1 || failed == "fsync directory") << failed << " at " << at;
      } else {
        EXPECT_EQ(loaded, 2) << failed << " at " << at;
        const bool unreadable_parent =
            (error == EACCES || error == EROFS) && failed == "fsync directory" && at == 1;
        EXPECT_EQ(result.left.empty(), done || unreadable_parent) << failed << " at " << at;
      }
    }
  }
}

TEST(CommitTest, RemovesTheOlderFilesAndNothingElse) {
  FaultFileSystem fs;
  fs.MakeDirectory("/");
  Save(fs, 1, {});
  const auto alive = NameOf(7, 0).ToString(), dead = NameOf(8, 0).ToString(),
             mine = NameOf(2, 5).ToString();
  std::unique_ptr<io::RawFile> file;
  for (const auto& name : {alive, dead, mine, std::string("notes.txt"), std::string("__0_0.distcp"),
                           std::string("__1_0.distcp")}) {
    ASSERT_EQ(fs.Open(kDirectory + "/" + name, io::OpenMode::kCreate, &file), 0);
  }
  ASSERT_EQ(fs.MakeDirectory("/other"), 0);
  ASSERT_EQ(fs.Open("/other/" + dead, io::OpenMode::kCreate, &file), 0);
  auto superseded = Names(1);
  superseded.insert(superseded.end(), {"../../other/" + dead, "notes.txt", "__0_0.distcp"});
  const auto result = Save(fs, 2, superseded, [](const format::ProcessIdentity& owner, int64_t) {
    return owner.pid == NameOf(8, 0).owner.pid;
  });
  EXPECT_THAT(result.removed,
              UnorderedElementsAre(Names(1)[0], Names(1)[1], dead, mine,
                                   "__0_0.distcp"));  // stock's, as the old metadata named it
  EXPECT_NE(fs.Bytes(kDirectory + "/" + alive), nullptr);
  EXPECT_NE(fs.Bytes(kDirectory + "/notes.txt"), nullptr);
  EXPECT_NE(fs.Bytes(kDirectory + "/__1_0.distcp"), nullptr);
  EXPECT_NE(fs.Bytes("/other/" + dead), nullptr);
  EXPECT_EQ(Load(fs), 2);
}

// After a restart every older owner is dead. Rank 0 commits first; if the job dies then, rank 1 has
// its older checkpoint.
TEST(CommitTest, FilesThatAnotherMetadataOfTheDirectoryMayNameStay) {
  const auto everybody_is_dead = [](const format::ProcessIdentity&, int64_t) { return true; };
  for (const bool coordinated_too : {false, true}) {
    FaultFileSystem fs;
    fs.MakeDirectory("/");
    Save(fs, 1, {});
    ASSERT_EQ(fs.Rename(kDirectory + "/.metadata", kDirectory + "/__1.metadata"), 0);
    std::unique_ptr<io::RawFile> file;
    ASSERT_EQ(fs.Open(kDirectory + "/" + NameOf(2, 0).ToString(), io::OpenMode::kCreate, &file), 0);
    if (coordinated_too) fs.Open(kDirectory + "/.metadata", io::OpenMode::kCreate, &file);
    checkpoint::CommitRequest request{kDirectory,
                                      "__0.metadata",
                                      Claim(fs, "__0.metadata", 2),
                                      base::AsBytes("new"),
                                      {{NameOf(2, 0).ToString(), 0}},
                                      {},
                                      true};
    const auto result = checkpoint::Commit(fs, request, everybody_is_dead);
    EXPECT_NE(fs.Bytes(kDirectory + "/" + Names(1)[1]), nullptr);
    // Rank 0's own leftover goes, unless a metadata of all ranks may name it.
    EXPECT_EQ(fs.Bytes(kDirectory + "/" + Names(1)[0]) != nullptr, coordinated_too);
    EXPECT_EQ(result.removed.empty(), coordinated_too);
    request.metadata_name = ".metadata";
    request.claim = Claim(fs, ".metadata", 3);
    checkpoint::Commit(fs, request, everybody_is_dead);
    EXPECT_NE(fs.Bytes(kDirectory + "/" + Names(1)[1]), nullptr) << "__1.metadata still names it";
  }
}

TEST(CommitTest, AMissingOrShortDataFileStopsIt) {
  FaultFileSystem fs;
  fs.MakeDirectory("/");
  Save(fs, 1, {});
  checkpoint::CommitRequest request{
      kDirectory, ".metadata", Claim(fs, ".metadata", 2), base::AsBytes("new"), {{Names(1)[0], 5}},
      Names(1),   true};
  EXPECT_THROW(checkpoint::Commit(fs, request, NobodyIsDead), base::Error);
  EXPECT_EQ(Load(fs), 1) << "a save that fails leaves files that the older checkpoint has as well";
  request.files = {{"__0_missing.distcp", 5}};
  EXPECT_THROW(checkpoint::Commit(fs, request, NobodyIsDead), base::Error);
}

TEST(DataFileNameTest, ParsesWhatItWritesAndNothingElse) {
  const format::DataFileName name{12, 0xfedcba9876543210, {0xabcdef01, 7, 4711, 99}, false, 3};
  EXPECT_EQ(name.ToString(), "__12_fedcba9876543210_abcdef01_00000007_4711_99_3.distcp");
  for (const bool by_torch : {false, true}) {
    format::DataFileName each = name;
    each.by_torch = by_torch;
    const auto back = format::DataFileName::Parse(each.ToString());
    ASSERT_TRUE(back);
    EXPECT_EQ(back->save_id, each.save_id);
    EXPECT_EQ(back->owner, each.owner);
    EXPECT_EQ(back->by_torch, by_torch);
  }
  for (const char* bad :
       {"__0_0.distcp", "../__12_fedcba9876543210_abcdef01_00000007_4711_99_3.distcp",
        "__012_fedcba9876543210_abcdef01_00000007_4711_99_3.distcp", ".metadata"}) {
    EXPECT_FALSE(format::DataFileName::Parse(bad)) << bad;
  }
}

TEST(ProcessIdentityTest, ThisProcessIsAliveAndAnEarlierOneOfItsPidIsDead) {
  const auto self = checkpoint::ThisProcess();
  EXPECT_FALSE(checkpoint::IsProvablyDead(self, 0));
  auto earlier = self;
  earlier.start -= 1;
  EXPECT_TRUE(checkpoint::IsProvablyDead(earlier, 0));
  auto elsewhere = earlier;
  elsewhere.host ^= 1;
  EXPECT_FALSE(checkpoint::IsProvablyDead(elsewhere, 0));
  auto before_boot = self;
  before_boot.boot ^= 1;
  EXPECT_TRUE(checkpoint::IsProvablyDead(before_boot, 1));  // untouched since 1970
  EXPECT_FALSE(
      checkpoint::IsProvablyDead(before_boot,
                                 INT64_MAX));  // written since this boot: another container's
}

}  // namespace
}  // namespace hsdp_ckpt
