#include "checkpoint/load/metadata_file.h"

#include <array>
#include <cerrno>

#include "base/error.h"
#include "format/metadata.h"
#include "io/file.h"

namespace hsdp_ckpt::checkpoint {

namespace {

io::File OpenMetadata(io::FileSystem& fs, const std::string& directory, const std::string& name) {
  try {
    return io::File::OpenInside(fs, directory, name, io::OpenMode::kRead);
  } catch (const base::IoError& error) {
    if (error.error_number() == ELOOP)
      throw base::Error(error.path() +
                        ": a link that leads out of the checkpoint's directory is not followed");
    if (error.error_number() == EOPNOTSUPP)
      throw base::Error(error.path() + ": not a regular file");
    throw;
  }
}

}  // namespace

std::vector<std::byte> ReadMetadataFile(io::FileSystem& fs, const std::string& directory,
                                        const std::string& name) {
  const io::File file = OpenMetadata(fs, directory, name);
  const int64_t size = file.Size();
  if (size > format::kMaxMetadataBytes)
    throw base::Error(file.path() + ": " + std::to_string(size) +
                      " bytes are too many for metadata");
  io::CheckNotHoles(file, size, "metadata");
  std::vector<std::byte> bytes(static_cast<size_t>(size));
  file.ReadAt(bytes, 0, "metadata");
  return bytes;
}

std::optional<format::RunMark> ReadRunMark(io::FileSystem& fs, const std::string& directory) {
  const io::File file = io::File::OpenInside(fs, directory, ".metadata", io::OpenMode::kRead);
  std::array<std::byte, format::kRunMarkSize + format::kMetadataTrailerSize> end;
  const int64_t size = file.Size();
  if (size < static_cast<int64_t>(end.size())) return std::nullopt;
  file.ReadAt(end, size - static_cast<int64_t>(end.size()), "metadata");
  return format::ParseRunMark(end);
}

}  // namespace hsdp_ckpt::checkpoint
