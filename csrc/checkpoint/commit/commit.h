#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/commit/leftovers.h"
#include "checkpoint/commit/process_identity.h"
#include "io/file_system.h"

namespace hsdp_ckpt::checkpoint {

struct ExpectedFile {
  std::string name;
  int64_t size = 0;
  bool exact =
      true;  ///< false: `size` is the least it may have (files that torch's own writer wrote)
};

/// What the coordinator knows when every rank has voted for the save.
struct CommitRequest {
  std::string directory;
  std::string metadata_name;  ///< ".metadata", or "__3.metadata" in a save without coordination
  std::string
      claim;  ///< what ClaimDirectory gave for this directory and metadata at the save's start
  std::span<const std::byte> metadata;
  std::vector<ExpectedFile> files;  ///< all data files that `metadata` names
  std::vector<std::string>
      superseded;  ///< names that the older checkpoint's metadata gave, unchecked; may be anything
  bool sync = true;
};

/// Makes the new checkpoint the directory's one, in the steps numbered in the source;
/// docs/design/format.md argues over them.
///
/// Throws before the rename: the older checkpoint is untouched, the new save's files are gone as
/// far as they can be; Error if a later save has taken the directory over, also where that happened
/// between any two steps. Throws at the rename or after it (the directory's sync failed): both
/// checkpoints are complete on disk, either may be the directory's one after a power loss, and
/// nothing is removed.
///
/// Two commits into one directory must not run at the same time in one process; the caller sees to
/// that.
CleanupResult Commit(io::FileSystem& fs, const CommitRequest& request,
                     const OwnerLiveness& liveness);

}  // namespace hsdp_ckpt::checkpoint
