#pragma once

#include <cstdint>

#include "format/data_file_name.h"

namespace hsdp_ckpt::checkpoint {

/// The calling process. Read from /proc; a part that can't be read is 0, and nothing is ever proven
/// of it.
format::ProcessIdentity ThisProcess();

/// Whether the process that wrote a file is provably gone: of this boot and PID namespace and not
/// running any more, or of this host before it booted, by a file that nobody has touched since.
/// Anything else may be alive. `modified`: the file's modification time, seconds since the epoch.
bool IsProvablyDead(const format::ProcessIdentity& process, int64_t modified);

}  // namespace hsdp_ckpt::checkpoint
