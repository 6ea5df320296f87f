#pragma once

#include <functional>
#include <string>

#include "io/file_system.h"

namespace hsdp_ckpt::io {

/// Asked before a call of the operating system, under the name that an IoError would give it: 0
/// lets it go on, a negative errno fails it, a positive number cuts a read or a write to that many
/// bytes. Meanwhile the call has not begun: the fault may end or stop the process, or do to the
/// directory what another process could do there. Called on any thread.
using InjectedFault = std::function<int(const std::string& op, const std::string& path)>;

/// For tests with real processes and real files: from now on the calls of PosixFileSystem(), and of
/// the files that it opens from now on, ask `fault` first; an empty one ends that. A process that
/// never calls this asks nobody and pays nothing.
void InjectFault(InjectedFault fault);

/// `real`, or what stands before it once InjectFault has been called.
FileSystem& WithInjectedFault(FileSystem& real);

}  // namespace hsdp_ckpt::io
