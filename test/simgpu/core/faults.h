#pragma once

namespace simgpu {

/// The exit status of a process that a deadlock has ended, and of one whose host has touched device
/// memory.
constexpr int kDeadlockExit = 70;
constexpr int kHostOnDeviceExit = 71;
/// ... and of one that came to a collective with another one than its peers.
constexpr int kMismatchExit = 72;

/// Sees to it that faults on the engine's memory are its own to handle, also where others have put
/// a handler in since. Other faults go to whoever was there before.
void CatchFaults();

}  // namespace simgpu
