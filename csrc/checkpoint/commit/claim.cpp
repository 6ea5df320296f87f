// Claims are ordered by (number, save id), and a save only ever removes lower ones than its own.
//   a. The directory is listed; the new claim's number is one above the highest there.
//   b. The claim is made, under a name that no other save can have.
//   c. The directory is listed again. Lower claims are removed. A higher one belongs to a save that
//      began at the same time: this one gives up. So does a save whose claim is gone by then.
// Of two saves the one that comes to c last sees the other's claim. If it is the lower one, it
// gives up; if not, it removes the other's. The highest claim is nobody's to remove, so one save
// always goes on. A save that begins when another one is past b sees its claim in a and takes a
// higher number: it removes it, whatever the other one is at.
#include "checkpoint/commit/claim.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "base/error.h"
#include "checkpoint/commit/process_identity.h"
#include "io/file.h"

namespace hsdp_ckpt::checkpoint {
namespace {

constexpr std::string_view kSuffix = ".tmp";
// A higher number, which no directory comes to, was planted: obeyed, it would keep all saves out.
constexpr int64_t kMostClaims = 1'000'000'000'000;

using Order = std::pair<int64_t, uint64_t>;

Order OrderOf(const ClaimName& claim) { return {claim.writer.number, claim.writer.save_id}; }

std::vector<std::pair<std::string, Order>> Claims(io::FileSystem& fs, const std::string& directory,
                                                  const std::string& metadata_name) {
  std::vector<std::pair<std::string, Order>> claims;
  for (std::string& name : io::ListDirectory(fs, directory)) {
    const auto claim = ParseClaim(name);
    if (claim && claim->metadata_name == metadata_name)
      claims.emplace_back(std::move(name), OrderOf(*claim));
  }
  return claims;
}

}  // namespace

std::optional<ClaimName> ParseClaim(const std::string& name) {
  constexpr std::string_view kMetadata = ".metadata";
  if (!name.ends_with(kSuffix)) return std::nullopt;
  const size_t at = name.find(kMetadata);
  if (at == std::string::npos) return std::nullopt;
  const size_t end = at + kMetadata.size();
  const auto writer =
      format::DataFileName::Parse(name.substr(end, name.size() - end - kSuffix.size()));
  if (!writer || writer->number > kMostClaims + 1) return std::nullopt;
  return ClaimName{name.substr(0, end), *writer};
}

std::string ClaimDirectory(io::FileSystem& fs, const std::string& directory,
                           const std::string& metadata_name, uint64_t save_id, bool overwrite) {
  const auto check_overwrite = [&] {
    io::FileStatus status;
    const std::string metadata = io::JoinPath(directory, metadata_name);
    if (!overwrite && io::GetStatus(fs, metadata, &status)) {
      throw base::Error(metadata +
                        ": there is a checkpoint already and overwrite=False; nothing was written");
    }
  };
  // First: a save that is refused must not take the directory from one that is under way. Again
  // with the claim, for what was committed meanwhile.
  check_overwrite();
  int64_t number = 1;
  for (const auto& [name, order] : Claims(fs, directory, metadata_name)) {  // a
    if (order.first <= kMostClaims) number = std::max(number, order.first + 1);
  }
  const ClaimName own{metadata_name, {0, save_id, ThisProcess(), false, number}};
  const std::string own_name = metadata_name + own.writer.ToString() + std::string(kSuffix);
  io::File file =
      io::File::Open(fs, io::JoinPath(directory, own_name), io::OpenMode::kCreate);  // b
  try {
    file.Close();
    bool found = false;
    for (const auto& [name, order] : Claims(fs, directory, metadata_name)) {  // c
      if (name == own_name) {
        found = true;
      } else if (order.first > kMostClaims) {
        continue;
      } else if (order < OrderOf(own)) {
        io::RemoveFile(fs, io::JoinPath(directory, name));
      } else {
        throw base::Error(io::JoinPath(directory, name) +
                          ": another save into this directory begins at the same time and goes on");
      }
    }
    if (!found)
      throw base::Error(
          directory +
          ": another save into this directory began at the same time and has taken it over");
    check_overwrite();
  } catch (...) {
    ReleaseClaim(fs, directory, own_name);
    throw;
  }
  return own_name;
}

void ReleaseClaim(io::FileSystem& fs, const std::string& directory,
                  const std::string& claim) noexcept {
  try {
    io::RemoveFile(fs, io::JoinPath(directory, claim));
  } catch (const std::exception&) {
    // The next save removes it.
  }
}

}  // namespace hsdp_ckpt::checkpoint
