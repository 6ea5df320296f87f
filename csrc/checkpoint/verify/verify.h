#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "io/file_system.h"

namespace hsdp_ckpt::checkpoint {

/// One thing that is wrong with a checkpoint.
struct VerifyProblem {
  std::string file;    ///< relative to the checkpoint's directory
  std::string record;  ///< the tensor's or object's name; empty if it is the file as a whole
  std::string message;
  friend bool operator==(const VerifyProblem&, const VerifyProblem&) = default;
};

struct VerifyReport {
  std::vector<VerifyProblem>
      problems;  ///< none: the checkpoint loads, and every byte of it is what was written
  std::vector<std::string>
      unchecked;  ///< records that have no checksum and were only found to be there: "file: name"
  std::vector<std::string> leftovers;  ///< data files that `.metadata` does not name
  int64_t files = 0;
  int64_t tensors = 0;  ///< names, not chunks
  int64_t objects = 0;
  int64_t bytes = 0;  ///< read from data files
};

/// Reads all of a checkpoint, ours or stock torch's, and checks it: that `.metadata` decodes, that
/// its chunks cover each tensor once, that every record is there, of the dtype and shape that
/// `.metadata` says, and every checksum, byte of padding and index. Needs the memory of one object
/// and a few MiB a thread. What is wrong is reported and not thrown. One that is saved over
/// meanwhile is looked at again.
VerifyReport Verify(io::FileSystem& fs, const std::string& directory, int threads);

}  // namespace hsdp_ckpt::checkpoint
