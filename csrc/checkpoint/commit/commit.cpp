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
//   8. Data files of the older checkpoint and of saves that have ended (commit/leftovers) are
//      removed. Not before 7: until the rename is durable, a power loss may bring the older
//      metadata back. Never one that another metadata here may name, or that a save which is still
//      under way has written.
#include "checkpoint/commit/commit.h"

#include <algorithm>
#include <cerrno>

#include "base/error.h"
#include "io/file.h"

namespace hsdp_ckpt::checkpoint {
namespace {

void CheckDirectory(io::FileSystem& fs, const CommitRequest& request) {
  io::FileStatus status;
  if (!io::GetStatus(fs, request.directory, &status))
    throw base::IoError("stat", request.directory, -1, ENOENT);
}

// The claim is gone: somebody else's save has the directory now, or the directory itself is gone.
[[noreturn]] void ThrowLost(io::FileSystem& fs, const CommitRequest& request) {
  CheckDirectory(fs, request);
  throw base::Error(io::JoinPath(request.directory, request.claim) +
                    ": another save into this directory began after this one and has taken it "
                    "over; this one is not committed");
}

// A later save removes the files of the one that it takes the directory from.
void CheckClaim(io::FileSystem& fs, const CommitRequest& request) {
  io::FileStatus status;
  if (!io::GetStatus(fs, io::JoinPath(request.directory, request.claim), &status))
    ThrowLost(fs, request);
}

void CheckFiles(io::FileSystem& fs, const CommitRequest& request) {
  for (const ExpectedFile& file : request.files) {
    const std::string path = io::JoinPath(request.directory, file.name);
    io::FileStatus status;
    if (!io::GetStatus(fs, path, &status)) {
      CheckDirectory(fs, request);
      CheckClaim(fs, request);
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

CleanupResult RemoveOld(io::FileSystem& fs, const CommitRequest& request,
                        const OwnerLiveness& liveness) {
  CleanupResult result;
  try {
    Cleanup cleanup{request.directory, request.metadata_name, "", {}, {}, {}};
    cleanup.superseded = {request.superseded.begin(), request.superseded.end()};
    for (const ExpectedFile& file : request.files) {
      cleanup.committed.insert(file.name);
      // What else this save's processes left here, from a save that failed, is of no use.
      if (const auto parsed = format::DataFileName::Parse(file.name))
        cleanup.own.push_back(parsed->owner);
    }
    const Leftovers leftovers(fs, cleanup, liveness);
    // Asked after the listings. A save that has committed by now is noticed here, and what is old
    // is then its to say; the claim of one that commits later was listed.
    if (!IsCurrent(fs, request)) return result;
    for (const std::string& name : leftovers.Find(&result))
      TryRemove(fs, request.directory, name, &result);
  } catch (const base::IoError& error) {
    result.left.push_back(error.what());
  }
  return result;
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
    if (error.error_number() == ENOENT) ThrowLost(fs, request);
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

CleanupResult Commit(io::FileSystem& fs, const CommitRequest& request,
                     const OwnerLiveness& liveness) {
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
      ThrowLost(fs, request);
    }
  }
  if (request.sync) io::SyncDirectory(fs, request.directory);  // 7
  return RemoveOld(fs, request, liveness);                     // 8
}

}  // namespace hsdp_ckpt::checkpoint
