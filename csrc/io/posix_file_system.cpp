#include <dirent.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <utility>

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
  int64_t Allocated() override {
    struct stat status;
    return ::fstat(fd_, &status) < 0 ? -errno : static_cast<int64_t>(status.st_blocks) * 512;
  }
  int Identify(FileIdentity* identity) override {
    struct stat status;
    if (::fstat(fd_, &status) < 0) return -errno;
    *identity = {status.st_dev, status.st_ino, status.st_size,
                 status.st_mtim.tv_sec * 1'000'000'000 + status.st_mtim.tv_nsec};
    return 0;
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

// A descriptor, closed with its scope.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  int Release() { return std::exchange(fd_, -1); }
  void Reset(int fd) {
    if (fd_ >= 0) ::close(fd_);
    fd_ = fd;
  }

 private:
  int fd_;
};

// openat2 with RESOLVE_BENEATH, Linux 5.6: by number, as older headers lack it. -ENOSYS without it.
int OpenBeneath(int directory, const char* name, int flags) {
  constexpr long kOpenat2 = 437;
  constexpr uint64_t kNoMagicLinks = 0x02, kBeneath = 0x08;
  struct {
    uint64_t flags, mode, resolve;
  } how{static_cast<uint64_t>(flags), 0, kNoMagicLinks | kBeneath};
  for (int attempt = 0; attempt < 100; ++attempt) {
    const long fd = ::syscall(kOpenat2, directory, name, &how, sizeof(how));
    if (fd >= 0) return static_cast<int>(fd);
    if (errno != EAGAIN) break;  // somebody renamed what is on the way
  }
  return -errno;
}

// The same for older kernels, and where a filter of system calls refuses the new one: from
// directory to directory, without following any link.
int OpenWithoutLinks(int directory, const std::string& name, int flags) {
  Descriptor at(-1);
  for (size_t begin = 0;;) {
    const size_t slash = name.find('/', begin);
    const std::string part = name.substr(begin, slash - begin);
    const int from = at.get() < 0 ? directory : at.get();
    if (part == "..") return -ELOOP;
    if (slash == std::string::npos) return Result(::openat(from, part.c_str(), flags | O_NOFOLLOW));
    const int next = ::openat(from, part.c_str(), O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (next < 0) return errno == ENOTDIR ? -ELOOP : -errno;
    at.Reset(next);
    begin = slash + 1;
  }
}

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
    const bool direct = mode == OpenMode::kReadDirect;
    const char* const path = directory.empty() ? "." : directory.c_str();
    const Descriptor root(::open(path, O_PATH | O_DIRECTORY | O_CLOEXEC));
    if (root.get() < 0) return -errno;
    // What is no regular file is found out when it is open, which for a pipe waits for nobody.
    const int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | (direct ? O_DIRECT : 0);
    int opened = OpenBeneath(root.get(), name.c_str(), flags);
    if (opened == -ENOSYS || opened == -EPERM) opened = OpenWithoutLinks(root.get(), name, flags);
    if (opened == -EXDEV) return -ELOOP;
    if (opened == -ENXIO) return -EOPNOTSUPP;  // a socket
    if (opened < 0) return opened;
    Descriptor fd(opened);
    struct stat found;
    if (::fstat(fd.get(), &found) < 0) return -errno;
    if (!S_ISREG(found.st_mode)) return -EOPNOTSUPP;
    struct statfs storage;
    if (direct && ::fstatfs(fd.get(), &storage) == 0 && IsMemory(storage)) return -EINVAL;
    *file = std::make_unique<PosixFile>(fd.Release());
    return 0;
  }
  // Newer kernels take O_DIRECT on tmpfs and copy all the same: an aligned bounce buffer would only
  // add a copy.
  bool IsInMemory(const std::string& path) override {
    struct statfs found;
    return ::statfs(path.empty() ? "." : path.c_str(), &found) == 0 && IsMemory(found);
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
  static bool IsMemory(const struct statfs& storage) {
    return storage.f_type == TMPFS_MAGIC || storage.f_type == RAMFS_MAGIC;
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
