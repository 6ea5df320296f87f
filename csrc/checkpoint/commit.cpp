// The commit protocol. At every instant the directory holds a complete older checkpoint, a complete new one, or plainly
// none.
//
// On every rank, before its vote (checkpoint/shard_file_writer, io/file):
//   1. Missing directories are made, and each one's parent is synced.
//   2. Data files are written under names that no other save ever used. Nothing that exists is opened for writing.
//   3. Each data file is synced, then the directory, so that both bytes and names survive a power loss.
// On the coordinator, once all ranks have voted (here):
//   4. Every data file that the new metadata names exists and has the size its rank voted for.
//   5. The metadata is written under a temporary name and synced. Nothing reads that name.
//   6. It is renamed to its final name: the commit. The older metadata is replaced in the same instant.
//   7. The directory is synced. From here on a power loss finds the new checkpoint.
//   8. Data files of the older checkpoint and of saves whose process is provably dead are removed. Not before 7: until the
//      rename is durable, a power loss may bring the older metadata back. Never one that another metadata here may name.
#include "checkpoint/commit.h"

#include <algorithm>
#include <charconv>
#include <iterator>
#include <optional>
#include <set>

#include "base/error.h"
#include "io/file.h"

namespace hsdp_ckpt {
namespace {

constexpr std::string_view kTemporarySuffix = ".tmp";

void CheckFiles(FileSystem& fs, const CommitRequest& request) {
  for (const ExpectedFile& file : request.files) {
    const std::string path = JoinPath(request.directory, file.name);
    FileStatus status;
    if (!GetStatus(fs, path, &status)) {
      throw Error(path +
                  ": the coordinator does not see this file that a rank has written; all ranks need the same directory, "
                  "on storage they share");
    }
    if (file.exact ? status.size != file.size : status.size < file.size) {
      throw Error(path + ": its rank wrote " + std::to_string(file.size) + " bytes, the coordinator sees " +
                  std::to_string(status.size));
    }
  }
}

// Removes without throwing: called where the save has failed already, or has succeeded already.
void TryRemove(FileSystem& fs, const std::string& directory, const std::string& name, CommitResult* result) {
  try {
    if (RemoveFile(fs, JoinPath(directory, name)) && result != nullptr) result->removed.push_back(name);
  } catch (const IoError& error) {
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

// A data file, or a temporary metadata: both carry their owner.
std::optional<DataFileName> ParseOwned(const std::string& name, const std::string& metadata_name) {
  if (name.starts_with(metadata_name + "__") && name.ends_with(kTemporarySuffix)) {
    const size_t prefix = metadata_name.size();
    return DataFileName::Parse(name.substr(prefix, name.size() - prefix - kTemporarySuffix.size()));
  }
  return DataFileName::Parse(name);
}

// N of "__N.metadata", which names only files of rank N; nothing for every other name.
std::optional<int64_t> RankOfMetadata(const std::string& name) {
  constexpr std::string_view kSuffix = ".metadata";
  if (!name.starts_with("__") || !name.ends_with(kSuffix) || name.size() <= 2 + kSuffix.size()) return std::nullopt;
  int64_t rank = 0;
  const char* end = name.data() + name.size() - kSuffix.size();
  const auto [parsed, error] = std::from_chars(name.data() + 2, end, rank);
  return error == std::errc() && parsed == end ? std::optional(rank) : std::nullopt;
}

// Whether a file of this rank may belong to a checkpoint that stays: another metadata of the directory could name it. In a
// save without coordination every rank has its own, and all but the first to commit are the older ones still.
bool OthersMayName(int64_t rank, const std::string& metadata_name, const std::vector<std::string>& names) {
  return std::any_of(names.begin(), names.end(), [&](const std::string& name) {
    if (name == metadata_name) return false;
    return name == ".metadata" || RankOfMetadata(name) == rank;
  });
}

CommitResult RemoveOld(FileSystem& fs, const CommitRequest& request, const OwnerIsDead& owner_is_dead) {
  CommitResult result;
  std::set<std::string> keep, superseded(request.superseded.begin(), request.superseded.end());
  for (const ExpectedFile& file : request.files) keep.insert(file.name);
  std::vector<ProcessIdentity> owners;  // of this save: what else they left here, from a save that failed, is of no use
  for (const ExpectedFile& file : request.files) {
    if (const auto parsed = DataFileName::Parse(file.name)) owners.push_back(parsed->owner);
  }
  std::vector<std::string> names;
  try {
    names = ListDirectory(fs, request.directory);
  } catch (const IoError& error) {
    result.left.push_back(error.what());
    return result;
  }
  std::vector<std::string> metadata_names;
  std::copy_if(names.begin(), names.end(), std::back_inserter(metadata_names),
               [](const std::string& name) { return name.ends_with(".metadata"); });
  const std::optional<int64_t> own_rank = RankOfMetadata(request.metadata_name);
  for (const std::string& name : names) {
    if (keep.contains(name)) continue;
    // A plain name from the directory's own listing: whatever a metadata may say, nothing outside is ever touched.
    const auto parsed = ParseOwned(name, request.metadata_name);
    bool old = superseded.contains(name) && (parsed || IsStockName(name));
    const bool data = DataFileName::Parse(name).has_value();
    // Nobody is certain to miss a file of another rank than a rank's own metadata is about: its rank's next save sees to
    // it.
    if (!old && data && own_rank && *own_rank != parsed->rank) continue;
    if (!old && data && OthersMayName(parsed->rank, request.metadata_name, metadata_names)) continue;
    old = old || (parsed && std::find(owners.begin(), owners.end(), parsed->owner) != owners.end());
    if (!old && parsed) {
      FileStatus status;
      try {
        old = GetStatus(fs, JoinPath(request.directory, name), &status) && owner_is_dead(parsed->owner, status.modified);
      } catch (const IoError& error) {
        result.left.push_back(error.what());
      }
    }
    if (old) TryRemove(fs, request.directory, name, &result);
  }
  return result;
}

}  // namespace

CommitResult Commit(FileSystem& fs, const CommitRequest& request, const OwnerIsDead& owner_is_dead) {
  const std::string path = JoinPath(request.directory, request.metadata_name);
  // Each attempt has a temporary name of its own, which says whose it is, so that what a dead save left can be removed.
  const std::string temporary = request.metadata_name + DataFileName{0, NewSaveId(), ThisProcess(), false, 0}.ToString() +
                                std::string(kTemporarySuffix);
  try {
    CheckFiles(fs, request);  // 4
    {
      File file = File::Open(fs, JoinPath(request.directory, temporary), OpenMode::kCreate);  // 5
      file.WriteAt(request.metadata, 0);
      if (request.sync) file.Sync();
      file.Close();
    }
  } catch (...) {
    TryRemove(fs, request.directory, temporary, nullptr);
    // Only what is this save's for certain: a writer of another kind may name files of the older checkpoint as well.
    for (const ExpectedFile& file : request.files) {
      const bool older =
          std::find(request.superseded.begin(), request.superseded.end(), file.name) != request.superseded.end();
      if (!older && DataFileName::Parse(file.name)) TryRemove(fs, request.directory, file.name, nullptr);
    }
    throw;
  }
  // A rename that fails may have happened all the same (a network file system's lost answer): nothing is removed after it.
  RenameFile(fs, JoinPath(request.directory, temporary), path);  // 6
  if (request.sync) SyncDirectory(fs, request.directory);        // 7
  return RemoveOld(fs, request, owner_is_dead);                  // 8
}

}  // namespace hsdp_ckpt
