#pragma once

#include <cstdint>
#include <string>

namespace hsdp_ckpt::hsdp {

/// Who speaks in an error of a unit's collective.
struct UnitName {
  int64_t rank;  ///< in the default group
  const std::string& unit;
};

/// Throws the current exception on, with the rank, the unit and `what` ("all-gather") in its
/// message. A torch error keeps its type; any other becomes a c10::DistBackendError.
[[noreturn]] void RethrowNaming(UnitName who, const char* what);

/// Runs `step` and returns what it returns; what it throws passes through RethrowNaming.
template <typename Step>
auto Naming(UnitName who, const char* what, Step step) {
  try {
    return step();
  } catch (...) {
    RethrowNaming(who, what);
  }
}

}  // namespace hsdp_ckpt::hsdp
