#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>

namespace hsdp_ckpt::format {

/// Where an entry of a saved object's archive lies, in bytes from the archive's start.
struct ArchiveEntry {
  uint64_t offset = 0;
  uint64_t size = 0;
};

/// The entries of an object that `torch.save` wrote as a zip, by what follows their names' first
/// slash, in lower case ("data.pkl", "data/0"); nothing for bytes that do not begin as a zip.
/// Throws CorruptionError for a zip that two readers could see two ways. `what` begins messages.
std::optional<std::map<std::string, ArchiveEntry>> ReadObjectArchive(
    std::span<const std::byte> data, const std::string& what);

}  // namespace hsdp_ckpt::format
