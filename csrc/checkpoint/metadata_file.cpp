#include "checkpoint/metadata_file.h"

#include "base/error.h"
#include "io/file.h"
#include "metadata/metadata.h"

namespace hsdp_ckpt {

std::vector<std::byte> ReadMetadataFile(FileSystem& fs, const std::string& directory, const std::string& name) {
  const File file = File::OpenInside(fs, directory, name, OpenMode::kRead);
  const int64_t size = file.Size();
  if (size > kMaxMetadataBytes) throw Error(file.path() + ": " + std::to_string(size) + " bytes are too many for metadata");
  std::vector<std::byte> bytes(static_cast<size_t>(size));
  file.ReadAt(bytes, 0, "metadata");
  return bytes;
}

}  // namespace hsdp_ckpt
