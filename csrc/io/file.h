#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "io/file_system.h"

namespace hsdp_ckpt::io {

/// An open file whose calls do all of what is asked or throw: the one place that knows EINTR and
/// short reads and writes.
///
/// Errors: IoError with the call, the path and the offset; a read past the end is a
/// CorruptionError, since every reader here knows how long the file must be. Thread-safe as the
/// RawFile is; Close is for the owner.
class File {
 public:
  static File Open(FileSystem& fs, const std::string& path, OpenMode mode);

  /// Opens `name` in `directory` for reading. It may be a link that leads to another place in
  /// `directory`, and none that leads out of it.
  static File OpenInside(FileSystem& fs, const std::string& directory, const std::string& name,
                         OpenMode mode);

  const std::string& path() const { return path_; }
  bool direct() const { return *direct_; }
  int64_t Size() const;
  /// Whether both are the same file.
  bool IsSame(const File& other) const;
  /// Bytes that the file system has given room to; 0 where that can't be told.
  int64_t Allocated() const;
  bool IsCached(int64_t offset, int64_t size) const { return raw_->IsCached(offset, size); }
  /// Fills `target` from `offset`. `what` names the part that is read, for the message of a file
  /// that is too short.
  void ReadAt(std::span<std::byte> target, int64_t offset, const std::string& what) const;
  /// As ReadAt, on a file opened for direct reads: address, `offset` and the size of `target` are
  /// multiples of 4096; wanted are the bytes up to `end`, which may be the file's own.
  void ReadDirect(std::span<std::byte> target, int64_t offset, int64_t end,
                  const std::string& what) const;
  /// With direct I/O: address, size and offset are multiples of 4096. Falls back to buffered writes
  /// for good where the file system refuses the first direct one (EINVAL).
  void WriteAt(std::span<const std::byte> data, int64_t offset);
  void Truncate(int64_t size);
  /// Reserves `size` bytes; false where the file system can't, which is no error. ENOSPC and EDQUOT
  /// are.
  bool Allocate(int64_t size);
  void Sync();
  void DisableDirect();
  void Close();

 private:
  File(std::unique_ptr<RawFile> raw, std::string path, bool direct)
      : raw_(std::move(raw)),
        path_(std::move(path)),
        direct_(std::make_unique<std::atomic<bool>>(direct)) {}

  std::unique_ptr<RawFile> raw_;
  std::string path_;
  std::unique_ptr<std::atomic<bool>> direct_;  // a worker may turn it off while others write
};

/// Throws Error, naming `what`, if `size` bytes of a file can only be holes, before memory is taken
/// for them. Files that compress well pass, and those that reading brings back from another tier.
void CheckNotHoles(const File& file, int64_t size, const std::string& what);
/// `directory`/`name`.
std::string JoinPath(const std::string& directory, const std::string& name);
/// What `directory` and its file system say of `path`; false if there is nothing of that name.
bool GetStatus(FileSystem& fs, const std::string& path, FileStatus* status);
std::vector<std::string> ListDirectory(FileSystem& fs, const std::string& path);
void RenameFile(FileSystem& fs, const std::string& from, const std::string& to);
/// Removes a file; one that isn't there is no error. False if it was not there.
bool RemoveFile(FileSystem& fs, const std::string& path);
void SyncDirectory(FileSystem& fs, const std::string& path);
/// Makes `path` and its missing parents. With `sync`, the entry of each directory that this call
/// made is durable in its parent on return, and so is that of the lowest one that was there before.
void MakeDirectories(FileSystem& fs, const std::string& path, bool sync);

}  // namespace hsdp_ckpt::io
