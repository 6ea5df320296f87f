#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace hsdp_ckpt::io {

/// Tells whether a file is the same one as before, and unchanged.
struct FileIdentity {
  uint64_t device = 0;
  uint64_t number = 0;  ///< the inode's
  int64_t size = 0;
  int64_t modified = 0;  ///< nanoseconds since the epoch
  friend bool operator==(const FileIdentity&, const FileIdentity&) = default;
};

/// One open file, as the operating system has it: a call may be interrupted or do less than asked.
/// `File` (io/file.h) is what the rest of the code uses; only it deals with that. Results are >= 0
/// or a negative errno. Calls are thread-safe.
class RawFile {
 public:
  virtual ~RawFile() = default;  // closes, whatever the state

  virtual ssize_t PRead(void* data, size_t size, int64_t offset) = 0;
  /// Whether all of a range lies in the page cache, so that reading it costs no I/O; false where
  /// that can't be told.
  virtual bool IsCached(int64_t /*offset*/, int64_t /*size*/) { return false; }
  virtual ssize_t PWrite(const void* data, size_t size, int64_t offset) = 0;
  virtual int64_t Size() = 0;
  /// Bytes of it that the file system has given room to; 0 where that can't be told.
  virtual int64_t Allocated() { return 0; }
  virtual int Identify(FileIdentity* /*identity*/) { return 0; }
  virtual int Truncate(int64_t size) = 0;
  /// Reserves blocks for bytes [0, size) and makes the file that long. -EOPNOTSUPP where the file
  /// system can't.
  virtual int Allocate(int64_t size) = 0;
  virtual int Sync() = 0;
  /// Turns direct I/O off for a file opened with it; for file systems that take the flag and refuse
  /// the write.
  virtual int DisableDirect() = 0;
  /// Closes and says what the close had to say; the destructor then does nothing more.
  virtual int Close() = 0;
};

enum class OpenMode {
  kRead,          ///< an existing file
  kReadDirect,    ///< the same past the page cache; -EINVAL where the file system refuses that
  kWrite,         ///< an existing file for writing; -ENOENT if there is none
  kCreate,        ///< a new file for writing; -EEXIST if there is one of that name
  kCreateDirect,  ///< the same past the page cache; -EINVAL where the file system refuses that
};

struct FileStatus {
  bool is_directory = false;
  int64_t size = 0;
  int64_t modified = 0;  ///< seconds since the epoch
};

/// What the checkpoint engine asks of an operating system: small enough to fake. Results are >= 0
/// or a negative errno; any call may be interrupted (-EINTR). Thread-safe.
class FileSystem {
 public:
  virtual ~FileSystem() = default;

  virtual int Open(const std::string& path, OpenMode mode, std::unique_ptr<RawFile>* file) = 0;
  /// As Open for reading `name` in `directory`, but -ELOOP where links lead out of the directory
  /// or are absolute, and -EOPNOTSUPP for what is no regular file (a pipe would keep its reader
  /// waiting). What is looked at is what is open: nobody can exchange it in between.
  virtual int OpenInside(const std::string& directory, const std::string& name, OpenMode mode,
                         std::unique_ptr<RawFile>* file) {
    return Open(
        directory.empty() || directory.ends_with('/') ? directory + name : directory + "/" + name,
        mode, file);
  }
  /// Whether files there are memory (tmpfs), so that reading them costs no I/O.
  virtual bool IsInMemory(const std::string& /*path*/) { return false; }
  virtual int Status(const std::string& path, FileStatus* status) = 0;
  /// Names in a directory, without "." and "..", in no order.
  virtual int List(const std::string& directory, std::vector<std::string>* names) = 0;
  virtual int MakeDirectory(const std::string& path) = 0;
  virtual int Rename(const std::string& from, const std::string& to) = 0;
  virtual int Remove(const std::string& path) = 0;
  /// Makes the directory's entries (files made, renamed, removed in it) survive a power loss.
  virtual int SyncDirectory(const std::string& path) = 0;
  /// Makes all of the file system that `path` is on survive a power loss.
  virtual int SyncFileSystem(const std::string& path) = 0;
};

/// The operating system's own, behind a test's fault if there is one (io/injected_fault.h, in
/// builds with tests only). Lives for ever.
FileSystem& PosixFileSystem();

}  // namespace hsdp_ckpt::io
