#include "io/file.h"

#include <cerrno>

#include "base/error.h"

namespace hsdp_ckpt::io {
namespace {

// Calls until it is not interrupted; throws what else goes wrong.
template <typename Call>
auto Checked(const char* op, const std::string& path, int64_t offset, const Call& call) {
  for (;;) {
    const auto rc = call();
    if (rc >= 0) return rc;
    if (rc != -EINTR) throw base::IoError(op, path, offset, static_cast<int>(-rc));
  }
}

}  // namespace

File File::Open(FileSystem& fs, const std::string& path, OpenMode mode) {
  std::unique_ptr<RawFile> raw;
  Checked("open", path, -1, [&] { return fs.Open(path, mode, &raw); });
  return File(std::move(raw), path,
              mode == OpenMode::kReadDirect || mode == OpenMode::kCreateDirect);
}

File File::OpenInside(FileSystem& fs, const std::string& directory, const std::string& name,
                      OpenMode mode) {
  std::unique_ptr<RawFile> raw;
  const std::string path = JoinPath(directory, name);
  Checked("open", path, -1, [&] { return fs.OpenInside(directory, name, mode, &raw); });
  return File(std::move(raw), path, mode == OpenMode::kReadDirect);
}

int64_t File::Size() const {
  return Checked("fstat", path_, -1, [&] { return raw_->Size(); });
}

bool File::IsSame(const File& other) const {
  FileIdentity own, others;
  Checked("fstat", path_, -1, [&] { return raw_->Identify(&own); });
  Checked("fstat", other.path_, -1, [&] { return other.raw_->Identify(&others); });
  return own == others;
}

int64_t File::Allocated() const {
  return Checked("fstat", path_, -1, [&] { return raw_->Allocated(); });
}

void CheckNotHoles(const File& file, int64_t size, const std::string& what) {
  constexpr int64_t kAlwaysTaken = int64_t{64} << 20;
  constexpr int64_t kMostCompressed = 1024;  // bytes of a file for one on the disk
  if (size <= kAlwaysTaken) return;
  const auto taken_by = [&](int64_t allocated) {
    return allocated == 0 || size / kMostCompressed <= allocated;
  };
  if (taken_by(file.Allocated())) return;
  // Storage in tiers (HSM) shows a block or none of a file that lies on tape, and brings it back
  // for whoever reads it.
  const int64_t end = file.Size();
  for (const int64_t at : {int64_t{0}, end - 1}) {
    std::byte read;
    if (at >= 0 && at < end) file.ReadAt({&read, 1}, at, what);
  }
  const int64_t allocated = file.Allocated();
  if (taken_by(allocated)) return;
  throw base::Error(file.path() + ": " + what + ": a file of holes, with " +
                    std::to_string(allocated) + " bytes on the disk, is to be read for " +
                    std::to_string(size) +
                    " bytes; if it lies on another tier of storage, bring "
                    "it back first");
}

void File::ReadAt(std::span<std::byte> target, int64_t offset, const std::string& what) const {
  size_t done = 0;
  while (done < target.size()) {
    const int64_t at = offset + static_cast<int64_t>(done);
    const auto n = Checked("pread", path_, at, [&] {
      return raw_->PRead(target.data() + done, target.size() - done, at);
    });
    if (n == 0) {
      throw base::CorruptionError(
          path_, what, std::to_string(target.size()) + " bytes at offset " + std::to_string(offset),
          "a file that ends after " + std::to_string(done) + " of them");
    }
    done += static_cast<size_t>(n);
  }
}

void File::ReadDirect(std::span<std::byte> target, int64_t offset, int64_t end,
                      const std::string& what) const {
  size_t done = 0;
  while (offset + static_cast<int64_t>(done) < end) {
    const int64_t at = offset + static_cast<int64_t>(done);
    const auto n = Checked("pread", path_, at, [&] {
      return raw_->PRead(target.data() + done, target.size() - done, at);
    });
    if (n == 0) {
      throw base::CorruptionError(
          path_, what, std::to_string(end - offset) + " bytes at offset " + std::to_string(offset),
          "a file that ends after " + std::to_string(done) + " of them");
    }
    if (at + n >= end) return;
    // Cut short inside a page, a direct read can only go on from the page's start.
    done = (done + static_cast<size_t>(n)) / 4096 * 4096;
    if (n < 4096) throw base::IoError("pread", path_, at, EINVAL);
  }
}

void File::WriteAt(std::span<const std::byte> data, int64_t offset) {
  size_t done = 0;
  while (done < data.size()) {
    const int64_t at = offset + static_cast<int64_t>(done);
    // Asked before the call: by its end another thread, refused as well, may have turned direct I/O
    // off.
    const bool was_direct = direct();
    const auto n = raw_->PWrite(data.data() + done, data.size() - done, at);
    if (n == -EINTR) continue;
    if (n == -EINVAL && was_direct) {
      DisableDirect();
      continue;
    }
    // A write of nothing without an error is a device that is full and can't say so.
    if (n <= 0) throw base::IoError("pwrite", path_, at, n == 0 ? ENOSPC : static_cast<int>(-n));
    done += static_cast<size_t>(n);
    // A direct write cut short may stop inside a block; only a buffered one can go on from there.
    if (direct() && done < data.size() && done % 4096 != 0) DisableDirect();
  }
}

void File::Truncate(int64_t size) {
  Checked("ftruncate", path_, size, [&] { return raw_->Truncate(size); });
}

bool File::Allocate(int64_t size) {
  for (;;) {
    const int rc = raw_->Allocate(size);
    if (rc >= 0) return true;
    if (rc == -EINTR) continue;
    if (rc == -EOPNOTSUPP || rc == -ENOSYS || rc == -EINVAL) return false;
    throw base::IoError("fallocate", path_, size, -rc);
  }
}

void File::Sync() {
  // Never a second fsync after a failed one: the kernel may have dropped the dirty pages and would
  // report success.
  const int rc = raw_->Sync();
  if (rc == -EINTR) return Sync();
  if (rc < 0) throw base::IoError("fsync", path_, -1, -rc);
}

void File::DisableDirect() {
  Checked("fcntl", path_, -1, [&] { return raw_->DisableDirect(); });
  *direct_ = false;
}

void File::Close() {
  Checked("close", path_, -1, [&] { return raw_->Close(); });
}

std::string JoinPath(const std::string& directory, const std::string& name) {
  return directory.empty() || directory.ends_with('/') ? directory + name : directory + "/" + name;
}

bool GetStatus(FileSystem& fs, const std::string& path, FileStatus* status) {
  for (;;) {
    const int rc = fs.Status(path, status);
    if (rc >= 0) return true;
    if (rc == -ENOENT) return false;
    if (rc != -EINTR) throw base::IoError("stat", path, -1, -rc);
  }
}

std::vector<std::string> ListDirectory(FileSystem& fs, const std::string& path) {
  std::vector<std::string> names;
  Checked("readdir", path, -1, [&] { return fs.List(path, &names); });
  return names;
}

void RenameFile(FileSystem& fs, const std::string& from, const std::string& to) {
  Checked("rename", from, -1, [&] { return fs.Rename(from, to); });
}

bool RemoveFile(FileSystem& fs, const std::string& path) {
  for (;;) {
    const int rc = fs.Remove(path);
    if (rc >= 0) return true;
    if (rc == -ENOENT) return false;
    if (rc != -EINTR) throw base::IoError("unlink", path, -1, -rc);
  }
}

void SyncDirectory(FileSystem& fs, const std::string& path) {
  Checked("fsync", path, -1, [&] { return fs.SyncDirectory(path.empty() ? "." : path); });
}

// Makes the entry of a new directory durable in its parent. One may be made in a parent that can't
// be read (mode 733), and so not be opened to be synced: then all of its file system is.
static void SyncEntry(FileSystem& fs, const std::string& parent, const std::string& path) {
  try {
    SyncDirectory(fs, parent);
  } catch (const base::IoError& error) {
    if (error.error_number() != EACCES) throw;
    Checked("syncfs", path, -1, [&] { return fs.SyncFileSystem(path); });
  }
}

void MakeDirectories(FileSystem& fs, const std::string& path, bool sync) {
  const size_t end = path.find_last_not_of('/');
  if (end == std::string::npos) return;  // a root, or where we are
  const size_t slash = path.rfind('/', end);
  const std::string parent = slash == std::string::npos ? ""
                             : slash == 0               ? "/"
                                                        : path.substr(0, slash);
  FileStatus status;
  if (GetStatus(fs, path, &status)) {
    // A save may have made it and died before it synced the parent. What is above was synced before
    // this was made.
    try {
      if (sync) SyncDirectory(fs, parent);
    } catch (const base::IoError& error) {
      // One that we may not read (/home), that is read-only, or that knows no syncing (a mount
      // point's parent, all of them) holds no entry that a save made.
      const int code = error.error_number();
      if (code != EACCES && code != EROFS && code != EINVAL) throw;
    }
    return;
  }
  MakeDirectories(fs, parent, sync);
  for (;;) {
    const int rc = fs.MakeDirectory(path);
    if (rc == -EINTR) continue;
    if (rc == -EEXIST) break;  // another rank was faster, or somebody who does not sync
    if (rc < 0) throw base::IoError("mkdir", path, -1, -rc);
    break;
  }
  if (sync) SyncEntry(fs, parent, path);
}

}  // namespace hsdp_ckpt::io
