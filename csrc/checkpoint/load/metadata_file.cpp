#include "checkpoint/load/metadata_file.h"

#include "base/error.h"
#include "format/metadata.h"
#include "io/file.h"

namespace hsdp_ckpt::checkpoint {

std::vector<std::byte> ReadMetadataFile(io::FileSystem& fs, const std::string& directory,
                                        const std::string& name) {
  const io::File file = io::File::OpenInside(fs, directory, name, io::OpenMode::kRead);
  const int64_t size = file.Size();
  if (size > format::kMaxMetadataBytes)
    throw base::Error(file.path() + ": " + std::to_string(size) +
                      " bytes are too many for metadata");
  std::vector<std::byte> bytes(static_cast<size_t>(size));
  file.ReadAt(bytes, 0, "metadata");
  return bytes;
}

}  // namespace hsdp_ckpt::checkpoint
