#pragma once

#include <source_location>
#include <string>
#include <vector>

namespace hsdp_ckpt::base {

/// What keeps the streams of a device in order, and memory alive until they have used it.
enum class Ordering { kEnter, kWithin, kJoin, kUses, kHold };

#ifdef HSDP_CKPT_TESTS

/// For tests that show what each ordering is for. From now on the call of the kind and in the
/// function that `name` says ("join Gather::Join") does nothing, and all calls are noted;
/// "" ends both.
void LeaveOut(const std::string& name);

/// The names of the calls noted so far, sorted.
std::vector<std::string> OrderingsSeen();

/// Whether the call of this kind in the function that `place` is in is left out.
bool IsLeftOut(Ordering kind, const std::source_location& place);

#else

inline bool IsLeftOut(Ordering, const std::source_location&) { return false; }

#endif

}  // namespace hsdp_ckpt::base
