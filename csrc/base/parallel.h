#pragma once

#include <cstddef>
#include <functional>

namespace hsdp_ckpt::base {

/// Calls fn(0) .. fn(count - 1) from up to `threads` threads, the calling one among them, and
/// returns when all are done.
///
/// Indices are handed out in order, so a call may wait for what calls with smaller indices do. The
/// first exception stops the handing out and is thrown here after the calls in progress have ended;
/// fn must not wait for an index that failed.
void ParallelFor(size_t count, int threads, const std::function<void(size_t)>& fn);

}  // namespace hsdp_ckpt::base
