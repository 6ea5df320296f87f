#include "checkpoint/commit/leftovers.h"

#include <algorithm>
#include <charconv>
#include <iterator>

#include "base/error.h"
#include "checkpoint/commit/claim.h"
#include "checkpoint/load/metadata_file.h"
#include "format/trailer.h"
#include "io/file.h"
#include "pickle/pickle_strings.h"

namespace hsdp_ckpt::checkpoint {
namespace {

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

// Every string in the metadata in place that may be a data file's name, perhaps more; none if there
// is no metadata. Throws Error if it can't be read.
std::set<std::string> NamesInMetadata(io::FileSystem& fs, const std::string& directory,
                                      const std::string& metadata_name) {
  std::set<std::string> names;
  const std::string path = io::JoinPath(directory, metadata_name);
  io::FileStatus status;
  if (!io::GetStatus(fs, path, &status)) return names;
  const std::vector<std::byte> file = ReadMetadataFile(fs, directory, metadata_name);
  pickle::ForEachString(format::CheckMetadataTrailer(file, path).pickle, path,
                        [&](std::string_view text) {
                          if (text.ends_with(".distcp")) names.emplace(text);
                        });
  return names;
}

}  // namespace

Leftovers::Leftovers(io::FileSystem& fs, const Cleanup& cleanup, const OwnerLiveness& liveness)
    : fs_(fs),
      cleanup_(cleanup),
      liveness_(liveness),
      own_rank_(RankOfMetadata(cleanup.metadata_name)),
      names_(io::ListDirectory(fs, cleanup.directory)) {
  std::copy_if(names_.begin(), names_.end(), std::back_inserter(metadata_names_),
               [](const std::string& name) { return name.ends_with(".metadata"); });
  ListClaims();
}

// Finds the ranks with files that another save may still commit: its claim is here and its
// coordinator may live. It is one rank for a save of that rank's own metadata, null for all ranks.
// Save ids can't tell: the files of a planner that caches plans have others than their claim.
void Leftovers::ListClaims() {
  for (const std::string& name : io::ListDirectory(fs_, cleanup_.directory)) {
    const auto claim = ParseClaim(name);
    if (!claim) continue;
    has_claim_ = has_claim_ || name == cleanup_.claim;
    if (name == cleanup_.claim) continue;
    io::FileStatus status;
    if (!io::GetStatus(fs_, io::JoinPath(cleanup_.directory, name), &status)) continue;
    if (!HasEnded(name, claim->writer.owner, /*claimed=*/false))
      under_way_.insert(RankOfMetadata(claim->metadata_name));
  }
}

std::vector<std::string> Leftovers::Find(CleanupResult* result) const {
  std::vector<std::string> found;
  for (const std::string& name : names_) {
    try {
      if (IsLeftover(name)) found.push_back(name);
    } catch (const base::IoError& error) {
      result->left.push_back(error.what());
    }
  }
  return found;
}

// A plain name from the directory's own listing: whatever a metadata may say, nothing outside is
// ever touched. Throws IoError if the file's time can't be read.
bool Leftovers::IsLeftover(const std::string& name) const {
  if (name == cleanup_.claim || cleanup_.committed.contains(name)) return false;
  const auto data = format::DataFileName::Parse(name);
  if (cleanup_.superseded.contains(name) && (data || IsStockName(name))) return true;
  if (data) {
    const bool own =
        std::find(cleanup_.own.begin(), cleanup_.own.end(), data->owner) != cleanup_.own.end();
    return MayBeRemoved(*data) && (own || HasEnded(name, data->owner, data->claimed()));
  }
  const auto claim = ParseClaim(name);
  return claim && claim->metadata_name == cleanup_.metadata_name &&
         HasEnded(name, claim->writer.owner, /*claimed=*/false);
}

// Whether nobody is certain to miss a data file.
bool Leftovers::MayBeRemoved(const format::DataFileName& data) const {
  // A file of another rank than a rank's own metadata is about: its rank's next save sees to it.
  if (own_rank_ && *own_rank_ != data.rank) return false;
  if (under_way_.contains(std::nullopt) || under_way_.contains(data.rank)) return false;
  return !OthersMayName(data.rank, cleanup_.metadata_name, metadata_names_);
}

// Whether the save that made a file has come to its end. `claimed`: it had claimed the directory,
// and has lost that claim, so that it can't commit any more whether its process lives or not.
bool Leftovers::HasEnded(const std::string& name, const format::ProcessIdentity& owner,
                         bool claimed) const {
  io::FileStatus status;
  if (!io::GetStatus(fs_, io::JoinPath(cleanup_.directory, name), &status)) return false;
  const Liveness liveness = liveness_(owner, status.modified);
  if (liveness != Liveness::kUnknown) return liveness == Liveness::kDead;
  return claimed || IsPastLease(status.modified);
}

// By the storage's clock: it has just made the claim, or the metadata.
bool Leftovers::IsPastLease(int64_t modified) const {
  const std::string& latest = cleanup_.claim.empty() ? cleanup_.metadata_name : cleanup_.claim;
  io::FileStatus status;
  return io::GetStatus(fs_, io::JoinPath(cleanup_.directory, latest), &status) &&
         status.modified - modified > kLeaseSeconds;
}

void TryRemove(io::FileSystem& fs, const std::string& directory, const std::string& name,
               CleanupResult* result) noexcept {
  try {
    if (io::RemoveFile(fs, io::JoinPath(directory, name)) && result != nullptr)
      result->removed.push_back(name);
  } catch (const base::IoError& error) {
    if (result != nullptr) result->left.push_back(error.what());
  }
}

CleanupResult RemoveLeftovers(io::FileSystem& fs, const std::string& directory,
                              const std::string& metadata_name, const std::string& claim,
                              const std::vector<format::ProcessIdentity>& own, bool sync,
                              const OwnerLiveness& liveness) {
  CleanupResult result;
  const Cleanup cleanup{directory, metadata_name, claim, {}, {}, own};
  const Leftovers leftovers(fs, cleanup, liveness);
  // A later save has taken the directory over: what is old is then its to say.
  if (!leftovers.has_claim()) return result;
  std::vector<std::string> found = leftovers.Find(&result);
  if (found.empty()) return result;
  // Read last: a save of a lower claim that has committed did so before it lost that claim.
  const std::set<std::string> named = NamesInMetadata(fs, directory, metadata_name);
  std::erase_if(found, [&](const std::string& name) { return named.contains(name); });
  if (found.empty()) return result;
  // A save that was killed behind its rename may not have synced it. A power loss would then bring
  // back the metadata before, and that one names these files.
  if (sync) io::SyncDirectory(fs, directory);
  for (const std::string& name : found) TryRemove(fs, directory, name, &result);
  return result;
}

}  // namespace hsdp_ckpt::checkpoint
