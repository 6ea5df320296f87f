#pragma once

#include <cstdint>
#include <functional>

#include "format/data_file_name.h"

namespace hsdp_ckpt::checkpoint {

/// The calling process. Read from /proc; a part that can't be read is 0, and nothing is ever proven
/// of it.
format::ProcessIdentity ThisProcess();

enum class Liveness {
  kRunning,  ///< it is here, and may still write
  kDead,     ///< it is provably gone
  kUnknown,  ///< of another host or PID namespace, where nothing can be seen of it
};

/// What can be said of the process that wrote a file. Dead is one of this boot and PID namespace
/// that does not run any more (a zombie does not), or of this host before it booted, by a file that
/// nobody has touched since. `modified`: the file's modification time, seconds since the epoch.
using OwnerLiveness =
    std::function<Liveness(const format::ProcessIdentity& owner, int64_t modified)>;

/// Looks at this machine's processes, at each one once: for one piece of work, on one thread.
OwnerLiveness LookAtProcesses();

}  // namespace hsdp_ckpt::checkpoint
