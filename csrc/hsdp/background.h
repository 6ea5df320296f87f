#pragma once

#include <functional>

namespace hsdp_ckpt::hsdp {

/// What the host does for reductions beside the computation, in two threads of the process: one
/// takes them in from the shard group and sums, the other one from the replicas. Each works in the
/// order of the calls, which is the same on all ranks. On CUDA streams do this. The threads start
/// with the first task and are never joined: one that waits for a dead peer must not hold up the
/// end of the process.
enum class Background { kShards, kReplicas };

/// Queues `task`, which owns what it works on and throws nothing.
void RunInBackground(Background where, std::function<void()> task);

}  // namespace hsdp_ckpt::hsdp
