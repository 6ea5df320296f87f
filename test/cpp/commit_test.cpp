// Power loss and failures at every call of a save over an older checkpoint: the directory must hold
// a complete checkpoint.
#include "checkpoint/commit/commit.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <random>

#include "base/bytes.h"
#include "base/error.h"
#include "checkpoint/commit/claim.h"
#include "checkpoint/commit/leftovers.h"
#include "checkpoint/commit/process_identity.h"
#include "checkpoint/load/read_plan.h"
#include "checkpoint/save/shard_file_writer.h"
#include "fault_file_system.h"
#include "io/file.h"
#include "pickle_bytes.h"

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

checkpoint::Liveness EverybodyRuns(const format::ProcessIdentity&, int64_t) {
  return checkpoint::Liveness::kRunning;
}

std::string Claim(io::FileSystem& fs, const std::string& metadata_name, uint64_t save_id) {
  return checkpoint::ClaimDirectory(fs, kDirectory, metadata_name, save_id, /*overwrite=*/true);
}

// A whole save: what every rank does up to its vote, then the coordinator. The "metadata" names
// files and records.
checkpoint::CleanupResult Save(io::FileSystem& fs, int generation,
                               const std::vector<std::string>& superseded,
                               const checkpoint::OwnerLiveness& liveness = EverybodyRuns) {
  checkpoint::CommitRequest request;
  request.directory = kDirectory;
  request.metadata_name = ".metadata";
  request.superseded = superseded;
  std::vector<std::string> metadata = {std::to_string(generation)};
  io::MakeDirectories(fs, kDirectory, true);
  request.claim = Claim(fs, ".metadata", static_cast<uint64_t>(generation));
  const auto leftovers =
      checkpoint::RemoveLeftovers(fs, kDirectory, ".metadata", request.claim, {}, true, liveness);
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
    for (const std::string& text :
         {request.files.back().name, std::to_string(places[0].offset) + " at",
          std::to_string(places[0].length) + " bytes"})
      metadata.push_back(text);
  }
  const std::string text = pickle_bytes::Texts(metadata);
  request.metadata = base::AsBytes(text);
  auto result = checkpoint::Commit(fs, request, liveness);
  result.left.insert(result.left.end(), leftovers.left.begin(), leftovers.left.end());
  return result;
}

// Which generation loads, bit for bit; -1 if there is no metadata. Anything in between throws.
int Load(FaultFileSystem& fs) {
  const auto* metadata = fs.Bytes(kDirectory + "/.metadata");
  if (metadata == nullptr) return -1;
  const auto texts = pickle_bytes::TextsIn({metadata->data(), metadata->size()});
  const int generation = std::stoi(texts.at(0));
  for (int rank = 0; rank < kRanks; ++rank) {
    const size_t at = 1 + 3 * static_cast<size_t>(rank);
    const std::string& name = texts.at(at);
    const int64_t offset = std::stoll(texts.at(at + 1)), length = std::stoll(texts.at(at + 2));
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

// Whether a save came to its end.
bool Saves(io::FileSystem& fs, int generation, const checkpoint::OwnerLiveness& liveness) {
  try {
    Save(fs, generation, {}, liveness);
    return true;
  } catch (const base::IoError&) {
    return false;
  }
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

// The second save is killed at any call; the third one loses power at any call before it writes,
// where it makes room. What the second one has renamed need not be durable by then.
TEST_P(PowerLossTest, WhileASaveMakesRoomBehindAKilledOneLeavesOneOfTheTwo) {
  const auto all_dead = [](const format::ProcessIdentity&, int64_t) {
    return checkpoint::Liveness::kDead;
  };
  std::set<int> found;
  bool second_done = false;
  for (int killed_at = 0; !second_done; ++killed_at) {
    bool writes = false;
    for (int lost_at = 0; !writes; ++lost_at) {
      FaultFileSystem fs;
      fs.MakeDirectory("/");
      Save(fs, 1, {});
      second_done = true;
      LosePowerAt(fs, killed_at, &second_done);  // a process that is killed does no more either
      const bool acknowledged = Saves(fs, 2, all_dead);
      fs.set_fault([&](const std::string& op, const std::string& path, int call) {
        const auto name = path.substr(path.rfind('/') + 1);
        writes = writes || (op == "open" && format::DataFileName::Parse(name));
        return call < lost_at && !writes ? 0 : -EIO;
      });
      EXPECT_FALSE(Saves(fs, 3, all_dead));
      fs.set_fault(nullptr);
      fs.PowerLoss(GetParam());
      const int loaded = Load(fs);
      found.insert(loaded);
      EXPECT_TRUE(loaded == 2 || (loaded == 1 && !acknowledged)) << killed_at << " " << lost_at;
    }
  }
  EXPECT_THAT(found, UnorderedElementsAre(1, 2));
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

// Mode 733: what is in it can't be listed, and it can't be opened to be synced.
TEST(CommitTest, ADirectoryInAParentThatCantBeReadIsDurableTooOrAnError) {
  for (const bool can_sync_all : {true, false}) {
    FaultFileSystem fs;
    fs.MakeDirectory("/");
    io::MakeDirectories(fs, "/dropbox", true);
    fs.set_fault([&](const std::string& op, const std::string& path, int) {
      if (op == "fsync directory" && path == "/dropbox") return -EACCES;
      return op == "syncfs" && !can_sync_all ? -EIO : 0;
    });
    if (!can_sync_all) {
      EXPECT_THROW(io::MakeDirectories(fs, "/dropbox/job", true), base::IoError);
      continue;
    }
    io::MakeDirectories(fs, "/dropbox/job", true);
    fs.PowerLoss(FaultFileSystem::Loss::kEverything);
    io::FileStatus status;
    EXPECT_TRUE(io::GetStatus(fs, "/dropbox/job", &status));
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
      checkpoint::CleanupResult result;
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
  const auto result = Save(fs, 2, superseded, [&](const format::ProcessIdentity& owner, int64_t) {
    const bool is_dead = owner.pid == NameOf(8, 0).owner.pid;
    return is_dead ? checkpoint::Liveness::kDead : checkpoint::Liveness::kRunning;
  });
  EXPECT_THAT(result.removed,
              UnorderedElementsAre(Names(1)[0], Names(1)[1], mine,
                                   "__0_0.distcp"));  // stock's, as the old metadata named it
  EXPECT_EQ(fs.Bytes(kDirectory + "/" + dead), nullptr) << "before the save needs the room";
  EXPECT_NE(fs.Bytes(kDirectory + "/" + alive), nullptr);
  EXPECT_NE(fs.Bytes(kDirectory + "/notes.txt"), nullptr);
  EXPECT_NE(fs.Bytes(kDirectory + "/__1_0.distcp"), nullptr);
  EXPECT_NE(fs.Bytes("/other/" + dead), nullptr);
  EXPECT_EQ(Load(fs), 2);
}

// After a restart every older owner is dead. Rank 0 commits first; if the job dies then, rank 1 has
// its older checkpoint.
TEST(CommitTest, FilesThatAnotherMetadataOfTheDirectoryMayNameStay) {
  const auto everybody_is_dead = [](const format::ProcessIdentity&, int64_t) {
    return checkpoint::Liveness::kDead;
  };
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
  EXPECT_THROW(checkpoint::Commit(fs, request, EverybodyRuns), base::Error);
  EXPECT_EQ(Load(fs), 1) << "a save that fails leaves files that the older checkpoint has as well";
  request.files = {{"__0_missing.distcp", 5}};
  EXPECT_THROW(checkpoint::Commit(fs, request, EverybodyRuns), base::Error);
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

TEST(ProcessIdentityTest, ThisProcessRunsAndAnEarlierOneOfItsPidIsDead) {
  using checkpoint::Liveness;
  const auto liveness = checkpoint::LookAtProcesses();
  const auto self = checkpoint::ThisProcess();
  EXPECT_EQ(liveness(self, 0), Liveness::kRunning);
  auto earlier = self;
  earlier.start -= 1;
  EXPECT_EQ(liveness(earlier, 0), Liveness::kDead);
  auto elsewhere = earlier;
  elsewhere.host ^= 1;
  EXPECT_EQ(liveness(elsewhere, 0), Liveness::kUnknown);
  auto before_boot = self;
  before_boot.boot ^= 1;
  EXPECT_EQ(liveness(before_boot, 1), Liveness::kDead);             // untouched since 1970
  EXPECT_EQ(liveness(before_boot, INT64_MAX), Liveness::kUnknown);  // another container's
}

TEST(ProcessIdentityTest, AKilledProcessIsDeadBeforeItsParentAsksForIt) {
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    const auto self = checkpoint::ThisProcess();
    if (::write(ends[1], &self, sizeof(self)) != sizeof(self)) ::_exit(1);
    ::pause();
  }
  format::ProcessIdentity identity;
  ASSERT_EQ(::read(ends[0], &identity, sizeof(identity)), ssize_t{sizeof(identity)});
  EXPECT_EQ(checkpoint::LookAtProcesses()(identity, 0), checkpoint::Liveness::kRunning);
  ::kill(child, SIGKILL);
  siginfo_t info;
  ASSERT_EQ(::waitid(P_PID, static_cast<id_t>(child), &info, WEXITED | WNOWAIT), 0);
  EXPECT_EQ(checkpoint::LookAtProcesses()(identity, 0), checkpoint::Liveness::kDead);
  ASSERT_EQ(::waitpid(child, nullptr, 0), child);
  EXPECT_EQ(checkpoint::LookAtProcesses()(identity, 0), checkpoint::Liveness::kDead);
}

}  // namespace
}  // namespace hsdp_ckpt
