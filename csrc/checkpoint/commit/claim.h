#pragma once

#include <optional>
#include <string>

#include "format/data_file_name.h"
#include "io/file_system.h"

namespace hsdp_ckpt::checkpoint {

/// A claim's file name: {metadata}{data file name}.tmp. The data file name inside says whose it is,
/// `number` counts the claims of a directory, and the save id is that of the save's data files.
struct ClaimName {
  std::string metadata_name;
  format::DataFileName writer;
};

/// Nullopt for every name that no claim has.
std::optional<ClaimName> ParseClaim(const std::string& name);

/// Makes a directory this save's: the last save to begin is the one that may commit, and exactly
/// one of several that begin at the same time goes on. Returns the claim's file name, for
/// CommitRequest or ReleaseClaim.
///
/// The claim is an empty file, later the metadata's temporary one. Claiming removes the claims of
/// all earlier saves, so that none of them can rename its own into place any more, wherever it has
/// been stopped: the rename itself is the check. The steps have letters in the source;
/// docs/design/format.md argues over them.
///
/// Throws Error if another save claims at the same time and is the later one, or if there is a
/// checkpoint and not `overwrite`. Nothing is left behind then.
std::string ClaimDirectory(io::FileSystem& fs, const std::string& directory,
                           const std::string& metadata_name, uint64_t save_id, bool overwrite);

/// Gives up a claim that was not committed. Never throws; a claim that stays is removed by the next
/// save.
void ReleaseClaim(io::FileSystem& fs, const std::string& directory,
                  const std::string& claim) noexcept;

}  // namespace hsdp_ckpt::checkpoint
