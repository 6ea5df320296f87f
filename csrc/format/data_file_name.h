#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace hsdp_ckpt::format {

/// Which process wrote a file, as far as another process can tell whether it still lives.
struct ProcessIdentity {
  uint32_t host = 0;  ///< CRC-32 of host name and machine id
  uint32_t boot = 0;  ///< CRC-32 of the kernel's boot id and the PID namespace
  int64_t pid = 0;
  uint64_t start =
      0;  ///< clock ticks after boot at which the process began; a reused pid has another

  friend bool operator==(const ProcessIdentity&, const ProcessIdentity&) = default;
};

/// A data file's name: __{rank}_{save id}_{host}_{boot}_{pid}_{start}[_torch]_{number}.distcp, the
/// first four of them after the rank as 16, 8 and 8 lower-case hex digits, the others decimal.
/// Never used twice: the save id is random and of 64 bits.
struct DataFileName {
  int64_t rank = 0;
  uint64_t save_id = 0;
  ProcessIdentity owner;
  bool by_torch = false;  ///< written by torch's own writer (extensions, other serialization
                          ///< formats): has no index
  int64_t number = 0;

  /// What the lowest 16 bits of a save id are if the save had claimed its directory. So many, since
  /// the ids of older versions, whose saves had not, are random.
  static constexpr uint64_t kClaimedMask = 0xffff;
  static constexpr uint64_t kClaimedMark = 0xc1a1;
  /// Whether the save that the file belongs to had claimed its directory before it wrote: then a
  /// later claim there has ended it.
  bool claimed() const { return (save_id & kClaimedMask) == kClaimedMark; }
  std::string ToString() const;
  /// Nullopt for every name that ToString never gives.
  static std::optional<DataFileName> Parse(const std::string& name);
};

/// 64 bits from the operating system, random but for the lowest 16: see DataFileName::claimed.
uint64_t NewSaveId(bool claimed);

}  // namespace hsdp_ckpt::format
