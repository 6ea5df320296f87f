#pragma once

#include <string>

#include "format/metadata.h"

namespace hsdp_ckpt::checkpoint {

/// Throws CorruptionError unless each record that `metadata` names has bytes of its own: no save
/// gives two the same, so that one of their places leads to what another tensor or chunk has.
/// `path` is that of `.metadata`, for messages.
void CheckRecordsDisjoint(const format::Metadata& metadata, const std::string& path);

}  // namespace hsdp_ckpt::checkpoint
