#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "format/trailer.h"
#include "io/file_system.h"

namespace hsdp_ckpt::checkpoint {

/// The bytes of a `.metadata` file, `name` in `directory`. Throws IoError, and Error for a file
/// that is larger than the decoder takes: nothing has been allocated for it, and it may be all
/// holes.
std::vector<std::byte> ReadMetadataFile(io::FileSystem& fs, const std::string& directory,
                                        const std::string& name);

/// The run mark of the checkpoint in `directory`, from the last bytes of its `.metadata`; nothing
/// if it has none. Throws IoError, with ENOENT where there is no `.metadata`.
std::optional<format::RunMark> ReadRunMark(io::FileSystem& fs, const std::string& directory);

}  // namespace hsdp_ckpt::checkpoint
