#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "checkpoint/commit/process_identity.h"
#include "format/data_file_name.h"
#include "io/file_system.h"

namespace hsdp_ckpt::checkpoint {

/// How long a file stays that only time can prove to be of no use: one of a process of which
/// nothing can be seen, whose save has not claimed the directory (or whose claim nobody has taken
/// over). Both times are the storage's own.
inline constexpr int64_t kLeaseSeconds = 24 * 60 * 60;

struct CleanupResult {
  std::vector<std::string> removed;
  std::vector<std::string> left;  ///< what could not be removed, with the reason
};

/// Whose directory is cleaned up, and what stays there.
struct Cleanup {
  std::string directory;
  std::string metadata_name;
  std::string claim;                 ///< of the save that cleans up; empty once it has committed
  std::set<std::string> committed;   ///< data files of the checkpoint in place
  std::set<std::string> superseded;  ///< those that an older one named, unchecked; may be anything
  /// Processes of which no save here is under way, though they may run.
  std::vector<format::ProcessIdentity> own;
};

/// The data files and claims in a directory that belong to no checkpoint and never will, as of two
/// listings: the names first, then the claims. A save claims before it writes, so the claim of a
/// save whose files are in the first listing is in the second one, unless that save has committed,
/// or has lost the directory to a later one. docs/design/format.md argues over it.
class Leftovers {
 public:
  /// Lists the directory; throws IoError. All arguments have to stay.
  Leftovers(io::FileSystem& fs, const Cleanup& cleanup, const OwnerLiveness& liveness);

  /// Whether the second listing had `cleanup.claim`.
  bool has_claim() const { return has_claim_; }
  /// The names; where a file can't be looked at, that goes into `result`.
  std::vector<std::string> Find(CleanupResult* result) const;

 private:
  void ListClaims();
  bool IsLeftover(const std::string& name) const;
  bool MayBeRemoved(const format::DataFileName& data) const;
  bool HasEnded(const std::string& name, const format::ProcessIdentity& owner, bool claimed) const;
  bool IsPastLease(int64_t modified) const;

  io::FileSystem& fs_;
  const Cleanup& cleanup_;
  const OwnerLiveness& liveness_;
  const std::optional<int64_t> own_rank_;
  std::vector<std::string> names_, metadata_names_;
  std::set<std::optional<int64_t>> under_way_;
  bool has_claim_ = false;
};

/// Removes a file of a directory without throwing, for where the save has failed already, or has
/// succeeded already. `result` may be null.
void TryRemove(io::FileSystem& fs, const std::string& directory, const std::string& name,
               CleanupResult* result) noexcept;

/// Makes room before a save writes: removes what other saves have left in a directory that `claim`
/// holds, and nothing that a metadata there names. With `sync`, what is named is durable first.
/// `own`: see Cleanup. Throws Error where the directory or its metadata can't be read; nothing has
/// been removed then.
CleanupResult RemoveLeftovers(io::FileSystem& fs, const std::string& directory,
                              const std::string& metadata_name, const std::string& claim,
                              const std::vector<format::ProcessIdentity>& own, bool sync,
                              const OwnerLiveness& liveness);

}  // namespace hsdp_ckpt::checkpoint
