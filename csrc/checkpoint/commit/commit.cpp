// The commit protocol. At every instant the directory holds a complete older checkpoint, a complete
// new one, or plainly none.
//
// On every rank, before its vote (checkpoint/save/shard_file_writer, io/file):
//   1. Missing directories are made, and each one's parent is synced.
//   2. Data files are written under names that no other save ever used. Nothing that exists is
//      opened for writing.
//   3. Each data file is synced, then the directory, so that both bytes and names survive a power
//      loss.
// On the coordinator, once all ranks have voted (here):
//   4. Every data file that the new metadata names exists and has the size its rank voted for.
//   5. The metadata is written into the save's claim (checkpoint/commit/claim) and synced. Nothing
//      reads that name.
//   6. The claim is renamed to the metadata's name: the commit. The older metadata is replaced in
//      the same instant. If a later save has taken the directory over, the claim is not there any
//      more and the rename fails.
//   7. The directory is synced. From here on a power loss finds the new checkpoint.
//   8. Data files of the older checkpoint and of saves whose process is provably dead are removed.
//      Not before 7: until the rename is durable, a power loss may bring the older metadata back.
//      Never one that another metadata here may name, or that a save which is still under way has
//      written.
#include "checkpoint/commit/commit.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <iterator>
#include <optional>
#include <set>

#include "base/error.h"
#include "checkpoint/commit/claim.h"
#include "io/file.h"

namespace hsdp_ckpt::checkpoint {
namespace {

void CheckDirectory(io::FileSystem& fs, const CommitRequest& request) {
  io::FileStatus status;
  if (!io::GetStatus(fs, request.directory, &status))
    throw base::IoError("stat", request.directory, -1, ENOENT);
}

void CheckFiles(io::FileSystem& fs, const CommitRequest& request) {
  for (const ExpectedFile& file : request.files) {
    const std::string path = io::JoinPath(request.directory, file.name);
    io::FileStatus status;
    if (!io::GetStatus(fs, path, &status)) {
      CheckDirectory(fs, request);
      throw base::Error(path +
                        ": the coordinator does not see this file that a rank has written; all "
                        "ranks need the same directory, "
                        "on storage they share");
    }
    if (file.exact ? status.size != file.size : status.size < file.size) {
      throw base::Error(path + ": its rank wrote " + std::to_string(file.size) +
                        " bytes, the coordinator sees " + std::to_string(status.size));
    }
  }
}

// Removes without throwing: called where the save has failed already, or has succeeded already.
void TryRemove(io::FileSystem& fs, const std::string& directory, const std::string& name,
               CommitResult* result) {
  try {
    if (io::RemoveFile(fs, io::JoinPath(directory, name)) && result != nullptr)
      result->removed.push_back(name);
  } catch (const base::IoError& error) {
    if (result != nullptr) result->left.push_back(error.what());
  }
}

// DCP's own names: __0_0.distcp. Removed only if the older metadata names them.
bool IsStockName(const std::string& name) {
  constexpr std::string_view kSuffix = ".distcp";
  if (!name.starts_with("__") || !name.ends_with(kSuffix)) return false;
  bool digit = false, separated = false;
  for (const char c : std::string_view(name).substr(2, name.size() - 2 - kSuffix.size())) {
    if (c >= '0' && c <= '9') {
      digit = true;
    } else if (c == '_' && digit && !separated) {
      digit = false;
      separated = true;
    } else {
      return false;
    }
  }
  return digit && separated;
}

// N of "__N.metadata", which names only files of rank N; nothing for every other name.
std::optional<int64_t> RankOfMetadata(const std::string& name) {
  constexpr std::string_view kSuffix = ".metadata";
  if (!name.starts_with("__") || !name.ends_with(kSuffix) || name.size() <= 2 + kSuffix.size())
    return std::nullopt;
  int64_t rank = 0;
  const char* end = name.data() + name.size() - kSuffix.size();
  const auto [parsed, error] = std::from_chars(name.data() + 2, end, rank);
  return error == std::errc() && parsed == end ? std::optional(rank) : std::nullopt;
}

// Whether a file of this rank may belong to a checkpoint that stays: another metadata of the
// directory could name it. In a save without coordination every rank has its own, and all but the
// first to commit are the older ones still.
bool OthersMayName(int64_t rank, const std::string& metadata_name,
                   const std::vector<std::string>& names) {
  return std::any_of(names.begin(), names.end(), [&](const std::string& name) {
    if (name == metadata_name) return false;
    return name == ".metadata" || RankOfMetadata(name) == rank;
  });
}

// Whether the metadata in place is byte for byte this save's: no other save has committed since.
bool IsCurrent(io::FileSystem& fs, const CommitRequest& request) {
  const std::string path = io::JoinPath(request.directory, request.metadata_name);
  io::FileStatus status;
  if (!io::GetStatus(fs, path, &status) ||
      status.size != static_cast<int64_t>(request.metadata.size()))
    return false;
  std::vector<std::byte> block(std::min<size_t>(request.metadata.size(), 1 << 20));
  try {
    io::File file = io::File::Open(fs, path, io::OpenMode::kRead);
    for (auto left = request.metadata; !left.empty(); left = left.subspan(block.size())) {
      block.resize(std::min(block.size(), left.size()));
      file.ReadAt(block, static_cast<int64_t>(request.metadata.size() - left.size()),
                  "the metadata");
      if (!std::equal(block.begin(), block.end(), left.begin())) return false;
    }
    file.Close();
  } catch (const base::CorruptionError&) {
    return false;  // replaced by a shorter one meanwhile
  }
  return true;
}

// The ranks with files that another save may still commit: its claim is here and nobody has shown
// its coordinator to be dead. It is one rank for a save of that rank's own metadata, null for all
// ranks. Save ids can't tell: the files of a planner that caches plans have others than their
// claim.
std::set<std::optional<int64_t>> RanksUnderWay(io::FileSystem& fs, const CommitRequest& request,
                                               const OwnerIsDead& owner_is_dead) {
  std::set<std::optional<int64_t>> ranks;
  for (const std::string& name : io::ListDirectory(fs, request.directory)) {
    const auto claim = ParseClaim(name);
    if (!claim) continue;
    io::FileStatus status;
    if (!io::GetStatus(fs, io::JoinPath(request.directory, name), &status)) continue;
    if (!owner_is_dead(claim->writer.owner, status.modified))
      ranks.insert(RankOfMetadata(claim->metadata_name));
  }
  return ranks;
}

// What the directory holds when a save has been committed there.
struct Listing {
  std::vector<std::string> names;
  std::set<std::optional<int64_t>> under_way;  // see RanksUnderWay
};

// Nothing if another save has committed meanwhile: what is old is then its to say.
std::optional<Listing> ListCommitted(io::FileSystem& fs, const CommitRequest& request,
                                     const OwnerIsDead& owner_is_dead) {
  Listing listing;
  // Candidates first: a save claims before it writes, so the claim of a candidate's save is in the
  // second listing.
  listing.names = io::ListDirectory(fs, request.directory);
  listing.under_way = RanksUnderWay(fs, request, owner_is_dead);
  // Asked last. A save that has committed by now is noticed here; the claim of one that commits
  // later was listed above.
  if (!IsCurrent(fs, request)) return std::nullopt;
  return listing;
}

// Says of each name in a directory whether it is a file of no use since a save was committed there.
class OldFiles {
 public:
  OldFiles(io::FileSystem& fs, const CommitRequest& request, const OwnerIsDead& owner_is_dead,
           const Listing& listing)
      : fs_(fs),
        request_(request),
        owner_is_dead_(owner_is_dead),
        under_way_(listing.under_way),
        own_rank_(RankOfMetadata(request.metadata_name)),
        superseded_(request.superseded.begin(), request.superseded.end()) {
    std::copy_if(listing.names.begin(), listing.names.end(), std::back_inserter(metadata_names_),
                 [](const std::string& name) { return name.ends_with(".metadata"); });
    for (const ExpectedFile& file : request.files) {
      committed_.insert(file.name);
      if (const auto parsed = format::DataFileName::Parse(file.name))
        owners_.push_back(parsed->owner);
    }
  }

  // A plain name from the directory's own listing: whatever a metadata may say, nothing outside is
  // ever touched. Throws IoError if the file's time can't be read.
  bool Contains(const std::string& name) const {
    if (committed_.contains(name)) return false;
    const auto data = format::DataFileName::Parse(name);
    if (superseded_.contains(name) && (data || IsStockName(name))) return true;
    if (data) return MayBeRemoved(*data) && (IsOfThisSave(*data) || IsOfTheDead(name, data->owner));
    const auto claim = ParseClaim(name);
    return claim && claim->metadata_name == request_.metadata_name &&
           IsOfTheDead(name, claim->writer.owner);
  }

 private:
  // Whether nobody is certain to miss a data file.
  bool MayBeRemoved(const format::DataFileName& data) const {
    // A file of another rank than a rank's own metadata is about: its rank's next save sees to it.
    if (own_rank_ && *own_rank_ != data.rank) return false;
    if (under_way_.contains(std::nullopt) || under_way_.contains(data.rank)) return false;
    return !OthersMayName(data.rank, request_.metadata_name, metadata_names_);
  }

  // What else this save's processes left here, from a save that failed, is of no use.
  bool IsOfThisSave(const format::DataFileName& data) const {
    return std::find(owners_.begin(), owners_.end(), data.owner) != owners_.end();
  }

  bool IsOfTheDead(const std::string& name, const format::ProcessIdentity& owner) const {
    io::FileStatus status;
    return io::GetStatus(fs_, io::JoinPath(request_.directory, name), &status) &&
           owner_is_dead_(owner, status.modified);
  }

  io::FileSystem& fs_;
  const CommitRequest& request_;
  const OwnerIsDead& owner_is_dead_;
  const std::set<std::optional<int64_t>>& under_way_;
  const std::optional<int64_t> own_rank_;
  const std::set<std::string> superseded_;
  std::set<std::string> committed_;
  std::vector<std::string> metadata_names_;
  std::vector<format::ProcessIdentity> owners_;
};

CommitResult RemoveOld(io::FileSystem& fs, const CommitRequest& request,
                       const OwnerIsDead& owner_is_dead) {
  CommitResult result;
  std::optional<Listing> listing;
  try {
    listing = ListCommitted(fs, request, owner_is_dead);
  } catch (const base::IoError& error) {
    result.left.push_back(error.what());
  }
  if (!listing) return result;
  const OldFiles old(fs, request, owner_is_dead, *listing);
  for (const std::string& name : listing->names) {
    try {
      if (!old.Contains(name)) continue;
    } catch (const base::IoError& error) {
      result.left.push_back(error.what());
      continue;
    }
    TryRemove(fs, request.directory, name, &result);
  }
  return result;
}

// The claim is gone: somebody else's save has the directory now, or the directory itself is gone.
[[noreturn]] void ThrowLost(io::FileSystem& fs, const CommitRequest& request,
                            const base::IoError& error) {
  CheckDirectory(fs, request);
  throw base::Error(io::JoinPath(request.directory, request.claim) +
                    ": another save into this directory began after this one and has taken it "
                    "over; this one is not committed (" +
                    error.what() + ")");
}

void WriteMetadata(io::FileSystem& fs, const CommitRequest& request) {
  try {
    // Never made anew: that would bring back a claim that a later save has removed.
    io::File file =
        io::File::Open(fs, io::JoinPath(request.directory, request.claim), io::OpenMode::kWrite);
    file.WriteAt(request.metadata, 0);
    if (request.sync) file.Sync();
    file.Close();
  } catch (const base::IoError& error) {
    if (error.error_number() == ENOENT) ThrowLost(fs, request, error);
    throw;
  }
}

// Only what is this save's for certain: a writer of another kind may name files of the older
// checkpoint as well.
void RemoveNew(io::FileSystem& fs, const CommitRequest& request) {
  TryRemove(fs, request.directory, request.claim, nullptr);
  for (const ExpectedFile& file : request.files) {
    const bool older = std::find(request.superseded.begin(), request.superseded.end(), file.name) !=
                       request.superseded.end();
    if (!older && format::DataFileName::Parse(file.name))
      TryRemove(fs, request.directory, file.name, nullptr);
  }
}

}  // namespace

CommitResult Commit(io::FileSystem& fs, const CommitRequest& request,
                    const OwnerIsDead& owner_is_dead) {
  try {
    CheckFiles(fs, request);     // 4
    WriteMetadata(fs, request);  // 5
  } catch (...) {
    RemoveNew(fs, request);
    throw;
  }
  // A rename that fails may have happened all the same (a network file system's lost answer):
  // nothing is removed after it, unless it is known that it has not.
  try {
    io::RenameFile(fs, io::JoinPath(request.directory, request.claim),
                   io::JoinPath(request.directory, request.metadata_name));  // 6
  } catch (const base::IoError& error) {
    if (error.error_number() != ENOENT) throw;
    if (!IsCurrent(fs, request)) {
      RemoveNew(fs, request);
      ThrowLost(fs, request, error);
    }
  }
  if (request.sync) io::SyncDirectory(fs, request.directory);  // 7
  return RemoveOld(fs, request, owner_is_dead);                // 8
}

}  // namespace hsdp_ckpt::checkpoint
