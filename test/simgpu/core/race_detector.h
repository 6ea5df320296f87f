#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "simgpu/core/clock.h"
#include "simgpu/core/operation.h"

namespace simgpu {

/// Who touched some bytes.
struct Toucher {
  int stream = -1;  ///< -1: nobody
  uint32_t time = 0;
  uint32_t name = 0;  ///< RaceDetector's number of it
  uint64_t issue = 0;
  std::shared_ptr<const Clock> clock;  ///< what is known to be over when it begins
};

/// Finds pairs of operations that touch the same bytes, one of them to write, where neither is
/// known to be over when the other begins. It asks clocks alone, which are those of the issue: a
/// race is found in any schedule, also where the operations have not run yet.
class RaceDetector {
 public:
  /// Looks at what an operation touches beside all that was touched before.
  void Touch(const std::string& name, int stream, uint32_t time, uint64_t issue,
             const std::shared_ptr<const Clock>& clock, const std::vector<Access>& accesses);
  /// Nobody has touched [first, last): it is new memory.
  void Forget(uintptr_t first, uintptr_t last);

 private:
  struct Cell {  // bytes that were touched alike, up to `last`
    uintptr_t last = 0;
    Toucher write;
    std::vector<Toucher> reads;  // since then, one a stream
  };
  using Cells = std::map<uintptr_t, Cell>;

  void Split(uintptr_t where);
  void Compare(const Access& access, const Toucher& by);
  void TakeWrite(const Access& access, const Toucher& by);
  void TakeRead(const Access& access, const Toucher& by);
  void Report(const Toucher& before, bool before_writes, const Toucher& now, bool now_writes,
              uintptr_t first, uintptr_t last);
  uint32_t NumberOf(const std::string& name);

  Cells cells_;
  std::vector<std::string> names_;
  std::unordered_map<std::string, uint32_t> number_of_;
};

}  // namespace simgpu
