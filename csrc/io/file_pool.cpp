#include "io/file_pool.h"

#include <sys/resource.h>

#include <algorithm>
#include <cerrno>

namespace hsdp_ckpt::io {

struct FilePool::Opened {
  std::string directory;
  std::string name;
  OpenMode mode;
};

// A file of the pool: its calls go to the open file, which a call keeps while it needs it.
class FilePool::PooledFile final : public RawFile {
 public:
  PooledFile(FilePool& pool, Opened what, const FileIdentity& identity)
      : pool_(pool), what_(std::move(what)), identity_(identity) {}
  ~PooledFile() override { pool_.Forget(this); }

  ssize_t PRead(void* data, size_t size, int64_t offset) override {
    return Call<ssize_t>([&](RawFile& file) { return file.PRead(data, size, offset); });
  }
  bool IsCached(int64_t offset, int64_t size) override {
    return Call<int>([&](RawFile& file) { return file.IsCached(offset, size) ? 1 : 0; }) == 1;
  }
  int64_t Size() override {
    return Call<int64_t>([](RawFile& file) { return file.Size(); });
  }
  int64_t Allocated() override {
    return Call<int64_t>([](RawFile& file) { return file.Allocated(); });
  }
  int Identify(FileIdentity* identity) override {
    *identity = identity_;
    return 0;
  }
  int Close() override {
    pool_.Forget(this);
    return 0;
  }
  // Files of a pool are read only.
  ssize_t PWrite(const void*, size_t, int64_t) override { return -EBADF; }
  int Truncate(int64_t) override { return -EBADF; }
  int Allocate(int64_t) override { return -EBADF; }
  int Sync() override { return -EBADF; }
  int DisableDirect() override { return -EBADF; }

 private:
  friend class FilePool;

  template <typename Result, typename Real>
  Result Call(const Real& real) {
    std::shared_ptr<RawFile> file;
    const int rc = Get(&file);
    return rc < 0 ? static_cast<Result>(rc) : real(*file);
  }

  int Get(std::shared_ptr<RawFile>* file) {
    {
      const std::lock_guard lock(pool_.mutex_);
      if (raw_) {
        pool_.open_.splice(pool_.open_.begin(), pool_.open_, place_);
        *file = raw_;
        return 0;
      }
    }
    std::unique_ptr<RawFile> again;
    if (const int rc = pool_.OpenWithRoom(what_, &again); rc < 0) return rc;
    FileIdentity identity;
    if (const int rc = again->Identify(&identity); rc < 0) return rc;
    if (identity != identity_) return -ESTALE;
    *file = pool_.Keep(this, std::move(again));
    return 0;
  }

  FilePool& pool_;
  const Opened what_;
  const FileIdentity identity_;
  // Under the pool's lock. The file is open, and in the pool's list at `place_`, if `raw_` is set.
  std::shared_ptr<RawFile> raw_;
  std::list<PooledFile*>::iterator place_;
};

int FilePool::OpenInside(const std::string& directory, const std::string& name, OpenMode mode,
                         std::unique_ptr<RawFile>* file) {
  Opened what{directory, name, mode};
  std::unique_ptr<RawFile> raw;
  if (const int rc = OpenWithRoom(what, &raw); rc < 0) return rc;
  FileIdentity identity;
  if (const int rc = raw->Identify(&identity); rc < 0) return rc;
  auto pooled = std::make_unique<PooledFile>(*this, std::move(what), identity);
  Keep(pooled.get(), std::move(raw));
  *file = std::move(pooled);
  return 0;
}

size_t FilePool::MostOfProcess() {
  constexpr size_t kLeast = 8, kMost = 1 << 20;
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return kLeast;
  return std::clamp<size_t>(limit.rlim_cur / 2, kLeast, kMost);
}

int FilePool::OpenWithRoom(const Opened& what, std::unique_ptr<RawFile>* file) {
  for (;;) {
    const int rc = fs_.OpenInside(what.directory, what.name, what.mode, file);
    if (rc != -EMFILE && rc != -ENFILE) return rc;
    const std::lock_guard lock(mutex_);
    if (open_.empty()) return rc;
    CloseOldest(open_.size() / 2);
  }
}

std::shared_ptr<RawFile> FilePool::Keep(PooledFile* file, std::unique_ptr<RawFile> raw) {
  const std::lock_guard lock(mutex_);
  if (file->raw_) return file->raw_;  // another thread has opened it meanwhile
  CloseOldest(most_ - 1);
  file->raw_ = std::move(raw);
  file->place_ = open_.insert(open_.begin(), file);
  return file->raw_;
}

void FilePool::Forget(PooledFile* file) {
  const std::lock_guard lock(mutex_);
  if (!file->raw_) return;
  open_.erase(file->place_);
  file->raw_.reset();
}

// Under the lock. A call that is at a file keeps it open until it is over.
void FilePool::CloseOldest(size_t left) {
  while (open_.size() > left) {
    open_.back()->raw_.reset();
    open_.pop_back();
  }
}

}  // namespace hsdp_ckpt::io
