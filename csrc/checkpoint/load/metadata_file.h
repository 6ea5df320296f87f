#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "io/file_system.h"

namespace hsdp_ckpt::checkpoint {

/// The bytes of a `.metadata` file, `name` in `directory`. Throws IoError, and Error for a file
/// that is larger than the decoder takes: nothing has been allocated for it, and it may be all
/// holes.
std::vector<std::byte> ReadMetadataFile(io::FileSystem& fs, const std::string& directory,
                                        const std::string& name);

}  // namespace hsdp_ckpt::checkpoint
