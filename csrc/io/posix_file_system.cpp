#include <dirent.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>

#include "io/file_system.h"
#ifdef HSDP_CKPT_TESTS
#include "io/injected_fault.h"
#endif

namespace hsdp_ckpt::io {
namespace {

int Result(int rc) { return rc < 0 ? -errno : rc; }

class PosixFile : public RawFile {
 public:
  explicit PosixFile(int fd) : fd_(fd) {}
  ~PosixFile() override {
    if (fd_ >= 0) ::close(fd_);
  }

  ssize_t PRead(void* data, size_t size, int64_t offset) override {
    const ssize_t n = ::pread(fd_, data, size, offset);
    return n < 0 ? -errno : n;
  }
  bool IsCached(int64_t offset, int64_t size) override {
    // cachestat, Linux 6.5: by number, as older headers lack it. Without it a file counts as not
    // cached.
    constexpr long kCachestat = 451;
    struct {
      uint64_t offset, size;
    } range{static_cast<uint64_t>(offset), static_cast<uint64_t>(size)};
    struct {
      uint64_t cached, dirty, writeback, evicted, recently_evicted;
    } found{};
    if (size <= 0 || ::syscall(kCachestat, fd_, &range, &found, 0) != 0) return false;
    const int64_t pages = (offset + size + 4095) / 4096 - offset / 4096;
    return found.cached >= static_cast<uint64_t>(pages);
  }
  ssize_t PWrite(const void* data, size_t size, int64_t offset) override {
    const ssize_t n = ::pwrite(fd_, data, size, offset);
    return n < 0 ? -errno : n;
  }
  int64_t Size() override {
    struct stat status;
    return ::fstat(fd_, &status) < 0 ? -errno : static_cast<int64_t>(status.st_size);
  }
  int Truncate(int64_t size) override { return Result(::ftruncate(fd_, size)); }
  int Allocate(int64_t size) override { return Result(::fallocate(fd_, 0, 0, size)); }
  int Sync() override { return Result(::fsync(fd_)); }
  int DisableDirect() override {
    const int flags = ::fcntl(fd_, F_GETFL);
    return flags < 0 ? -errno : Result(::fcntl(fd_, F_SETFL, flags & ~O_DIRECT));
  }
  int Close() override {
    // Never again, also after EINTR: on Linux the descriptor is gone either way and may be another
    // thread's by now.
    const int fd = fd_;
    fd_ = -1;
    const int rc = fd < 0 ? 0 : Result(::close(fd));
    return rc == -EINTR ? 0 : rc;
  }

 private:
  int fd_;
};

class Posix : public FileSystem {
 public:
  int Open(const std::string& path, OpenMode mode, std::unique_ptr<RawFile>* file) override {
    const bool create = mode == OpenMode::kCreate || mode == OpenMode::kCreateDirect;
    const bool direct = mode == OpenMode::kReadDirect || mode == OpenMode::kCreateDirect;
    if (direct && IsInMemory(create ? path.substr(0, path.rfind('/') + 1) : path)) return -EINVAL;
    const int access = create                     ? O_RDWR | O_CREAT | O_EXCL
                       : mode == OpenMode::kWrite ? O_WRONLY
                                                  : O_RDONLY;
    const int flags = O_CLOEXEC | access | (direct ? O_DIRECT : 0);
    int fd = ::open(path.c_str(), flags, 0666);
    if (fd < 0) {
      const int error = errno;
      // Some file systems make the file before they refuse the flag.
      if (create && direct && error == EINVAL) ::unlink(path.c_str());
      return -error;
    }
    *file = std::make_unique<PosixFile>(fd);
    return 0;
  }
  int OpenInside(const std::string& directory, const std::string& name, OpenMode mode,
                 std::unique_ptr<RawFile>* file) override {
    const std::string root = RealPath(directory.empty() ? "." : directory);
    const std::string path = RealPath(directory.empty() ? name : directory + "/" + name);
    if (root.empty() || path.empty()) return -errno;
    if (!path.starts_with(root.ends_with('/') ? root : root + "/")) return -ELOOP;
    struct stat found;
    if (::stat(path.c_str(), &found) < 0) return -errno;
    if (!S_ISREG(found.st_mode)) return -EOPNOTSUPP;
    return Open(path, mode, file);
  }
  // Newer kernels take O_DIRECT on tmpfs and copy all the same: an aligned bounce buffer would only
  // add a copy.
  bool IsInMemory(const std::string& path) override {
    struct statfs found;
    return ::statfs(path.empty() ? "." : path.c_str(), &found) == 0 &&
           (found.f_type == TMPFS_MAGIC || found.f_type == RAMFS_MAGIC);
  }
  int Status(const std::string& path, FileStatus* status) override {
    struct stat found;
    if (::stat(path.c_str(), &found) < 0) return -errno;
    *status = {S_ISDIR(found.st_mode), static_cast<int64_t>(found.st_size),
               static_cast<int64_t>(found.st_mtime)};
    return 0;
  }
  int List(const std::string& directory, std::vector<std::string>* names) override {
    DIR* stream = ::opendir(directory.c_str());
    if (stream == nullptr) return -errno;
    names->clear();
    errno = 0;
    while (const dirent* entry = ::readdir(stream)) {
      const std::string name = entry->d_name;
      if (name != "." && name != "..") names->push_back(name);
      errno = 0;
    }
    const int error = errno;
    ::closedir(stream);
    return -error;
  }
  int MakeDirectory(const std::string& path) override {
    return Result(::mkdir(path.c_str(), 0777));
  }
  int Rename(const std::string& from, const std::string& to) override {
    return Result(::rename(from.c_str(), to.c_str()));
  }
  int Remove(const std::string& path) override { return Result(::unlink(path.c_str())); }
  int SyncDirectory(const std::string& path) override {
    const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return -errno;
    int rc = Result(::fsync(fd));
    // A file system that has no such notion (some network ones) says EINVAL; its renames are its
    // server's business.
    if (rc == -EINVAL) rc = 0;
    ::close(fd);
    return rc;
  }
  int SyncFileSystem(const std::string& path) override {
    const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return -errno;
    const int rc = Result(::syncfs(fd));
    ::close(fd);
    return rc;
  }

 private:
  static std::string RealPath(const std::string& path) {
    char* real = ::realpath(path.c_str(), nullptr);
    std::string result = real == nullptr ? "" : real;
    std::free(real);
    return result;
  }
};

}  // namespace

FileSystem& PosixFileSystem() {
  static auto& instance = *new Posix;  // never destroyed: a thread may outlive main()
#ifdef HSDP_CKPT_TESTS
  return WithInjectedFault(instance);
#else
  return instance;
#endif
}

}  // namespace hsdp_ckpt::io
