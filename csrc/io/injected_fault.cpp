// Compiled in builds with tests only.
#include "io/injected_fault.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <utility>

namespace hsdp_ckpt::io {
namespace {

std::mutex mutex;
std::atomic<bool> in_use{false};

// The fault is kept on the heap for good: it may hold Python objects, which must not be let go
// after the interpreter has ended. It is shared, so that no such object is copied or let go, which
// takes the GIL, under the mutex.
std::shared_ptr<const InjectedFault>& Current() {
  static auto& fault = *new std::shared_ptr<const InjectedFault>;
  return fault;
}

int Ask(const char* op, const std::string& path) {
  std::shared_ptr<const InjectedFault> fault;
  {
    const std::lock_guard lock(mutex);
    fault = Current();
  }
  return fault && *fault ? (*fault)(op, path) : 0;
}

class FaultyFile : public RawFile {
 public:
  FaultyFile(std::unique_ptr<RawFile> real, std::string path)
      : real_(std::move(real)), path_(std::move(path)) {}

  ssize_t PRead(void* data, size_t size, int64_t offset) override {
    const int rc = Ask("pread", path_);
    return rc < 0 ? rc : real_->PRead(data, Cut(size, rc), offset);
  }
  bool IsCached(int64_t offset, int64_t size) override { return real_->IsCached(offset, size); }
  ssize_t PWrite(const void* data, size_t size, int64_t offset) override {
    const int rc = Ask("pwrite", path_);
    return rc < 0 ? rc : real_->PWrite(data, Cut(size, rc), offset);
  }
  int64_t Size() override {
    const int rc = Ask("fstat", path_);
    return rc < 0 ? rc : real_->Size();
  }
  int Truncate(int64_t size) override {
    return Call("ftruncate", [&] { return real_->Truncate(size); });
  }
  int Allocate(int64_t size) override {
    return Call("fallocate", [&] { return real_->Allocate(size); });
  }
  int Sync() override {
    return Call("fsync", [&] { return real_->Sync(); });
  }
  int64_t Allocated() override { return real_->Allocated(); }
  int Identify(FileIdentity* identity) override { return real_->Identify(identity); }
  int DisableDirect() override {
    return Call("fcntl", [&] { return real_->DisableDirect(); });
  }
  int Close() override {
    return Call("close", [&] { return real_->Close(); });
  }

 private:
  static size_t Cut(size_t size, int limit) {
    return limit > 0 ? std::min(size, static_cast<size_t>(limit)) : size;
  }
  template <typename Real>
  int Call(const char* op, const Real& real) {
    const int rc = Ask(op, path_);
    return rc < 0 ? rc : real();
  }

  std::unique_ptr<RawFile> real_;
  std::string path_;
};

class FaultyFileSystem : public FileSystem {
 public:
  explicit FaultyFileSystem(FileSystem& real) : real_(real) {}

  int Open(const std::string& path, OpenMode mode, std::unique_ptr<RawFile>* file) override {
    return Wrapped(path, file, [&] { return real_.Open(path, mode, file); });
  }
  int OpenInside(const std::string& directory, const std::string& name, OpenMode mode,
                 std::unique_ptr<RawFile>* file) override {
    return Wrapped(directory + "/" + name, file,
                   [&] { return real_.OpenInside(directory, name, mode, file); });
  }
  bool IsInMemory(const std::string& path) override { return real_.IsInMemory(path); }
  int Status(const std::string& path, FileStatus* status) override {
    return Call("stat", path, [&] { return real_.Status(path, status); });
  }
  int List(const std::string& directory, std::vector<std::string>* names) override {
    return Call("readdir", directory, [&] { return real_.List(directory, names); });
  }
  int MakeDirectory(const std::string& path) override {
    return Call("mkdir", path, [&] { return real_.MakeDirectory(path); });
  }
  int Rename(const std::string& from, const std::string& to) override {
    return Call("rename", from, [&] { return real_.Rename(from, to); });
  }
  int Remove(const std::string& path) override {
    return Call("unlink", path, [&] { return real_.Remove(path); });
  }
  int SyncDirectory(const std::string& path) override {
    return Call("fsync", path, [&] { return real_.SyncDirectory(path); });
  }
  int SyncFileSystem(const std::string& path) override {
    return Call("syncfs", path, [&] { return real_.SyncFileSystem(path); });
  }

 private:
  template <typename Real>
  static int Call(const char* op, const std::string& path, const Real& real) {
    const int rc = Ask(op, path);
    return rc < 0 ? rc : real();
  }
  template <typename Real>
  static int Wrapped(const std::string& path, std::unique_ptr<RawFile>* file, const Real& open) {
    const int rc = Call("open", path, open);
    if (rc >= 0) *file = std::make_unique<FaultyFile>(std::move(*file), path);
    return rc;
  }

  FileSystem& real_;
};

}  // namespace

void InjectFault(InjectedFault fault) {
  auto shared = std::make_shared<const InjectedFault>(std::move(fault));
  const std::lock_guard lock(mutex);
  std::swap(Current(), shared);
  in_use = true;
}

FileSystem& WithInjectedFault(FileSystem& real) {
  if (!in_use) return real;
  static auto& faulty = *new FaultyFileSystem(real);
  return faulty;
}

}  // namespace hsdp_ckpt::io
