#pragma once

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "io/file_system.h"

namespace hsdp_ckpt {

/// A file system in memory that can lose power and fail.
///
/// Every file has its bytes as programs see them and as they are on disk; so has every directory
/// its entries. Sync and SyncDirectory copy the one to the other. PowerLoss forgets what was not
/// synced, in one of the ways a real disk may. Calls are counted; `fault` is asked before each one
/// and may make it fail, interrupt it or cut it short. It may also use the file system itself: what
/// another process does while this one is stopped just there. Thread-safe.
class FaultFileSystem : public io::FileSystem {
 public:
  /// What a call does: 0 goes on, a negative errno fails it, a positive number cuts a read or a
  /// write to that many bytes.
  using Fault = std::function<int(const std::string& op, const std::string& path, int call)>;

  /// What a power loss does to what was not synced.
  enum class Loss {
    kEverything,   ///< entries and bytes as of their last sync
    kOnlyBytes,    ///< all entries made it to disk (a journal), bytes did not: a file not synced is
                   ///< empty or old
    kOnlyEntries,  ///< all bytes made it, entries did not
    kEveryOtherPage  ///< entries made it, of unsynced bytes every second 512
  };

  void set_fault(Fault fault) {
    const std::lock_guard lock(mutex_);
    fault_ = std::move(fault);
    calls_ = 0;
  }
  int calls() const { return calls_; }
  std::map<std::string, int64_t> modified;  ///< by path, seconds; 0 for others
  bool direct_supported = true;
  bool direct_write_supported = true;

  void PowerLoss(Loss loss) {
    const std::lock_guard lock(mutex_);
    if (loss == Loss::kEverything || loss == Loss::kOnlyEntries) {
      entries_ = durable_entries_;
      directories_ = durable_directories_;
      // What lies in a directory that did not survive is out of reach, whatever was synced of it;
      // so are its directories.
      const auto lost = [&](const std::string& path) {
        for (std::string at = Parent(path); at != "/"; at = Parent(at)) {
          if (!directories_.contains(at)) return true;
        }
        return false;
      };
      std::erase_if(entries_, [&](const auto& entry) { return lost(entry.first); });
      std::set<std::string> left;
      std::copy_if(directories_.begin(), directories_.end(), std::inserter(left, left.end()),
                   std::not_fn(lost));
      directories_ = left;
    }
    for (auto& [path, inode] : entries_) {
      if (loss == Loss::kOnlyEntries) continue;
      if (loss == Loss::kEveryOtherPage) {
        inode->durable.resize(inode->bytes.size());
        for (size_t at = 0; at < inode->bytes.size(); at += 1024) {
          std::copy_n(inode->bytes.begin() + static_cast<std::ptrdiff_t>(at),
                      std::min<size_t>(512, inode->bytes.size() - at),
                      inode->durable.begin() + static_cast<std::ptrdiff_t>(at));
        }
      }
      inode->bytes = inode->durable;
    }
    durable_entries_ = entries_;
    durable_directories_ = directories_;
    for (auto& [path, inode] : entries_) inode->durable = inode->bytes;
  }

  /// A file's bytes, to be looked at or damaged; null if there is none.
  std::vector<char>* Bytes(const std::string& path) {
    const auto found = entries_.find(path);
    return found == entries_.end() ? nullptr : &found->second->bytes;
  }

  int Open(const std::string& path, io::OpenMode mode,
           std::unique_ptr<io::RawFile>* file) override {
    const std::lock_guard lock(mutex_);
    if (const int rc = Ask("open", path); rc < 0) return rc;
    const bool create = mode == io::OpenMode::kCreate || mode == io::OpenMode::kCreateDirect;
    const bool direct = mode == io::OpenMode::kCreateDirect || mode == io::OpenMode::kReadDirect;
    if (direct && !direct_supported) return -EINVAL;
    const auto found = entries_.find(path);
    if (create && found != entries_.end()) return -EEXIST;
    if (!create && found == entries_.end()) return -ENOENT;
    if (create && !directories_.contains(Parent(path))) return -ENOENT;
    auto inode = create ? (entries_[path] = std::make_shared<Inode>()) : found->second;
    *file = std::make_unique<FakeFile>(this, path, inode, direct);
    return 0;
  }
  int Status(const std::string& path, io::FileStatus* status) override {
    const std::lock_guard lock(mutex_);
    if (const int rc = Ask("stat", path); rc < 0) return rc;
    if (directories_.contains(path)) {
      *status = {true, 0, 0};
      return 0;
    }
    const auto found = entries_.find(path);
    if (found == entries_.end()) return -ENOENT;
    const auto time = modified.find(path);
    *status = {false, static_cast<int64_t>(found->second->bytes.size()),
               time == modified.end() ? 0 : time->second};
    return 0;
  }
  int List(const std::string& directory, std::vector<std::string>* names) override {
    const std::lock_guard lock(mutex_);
    if (const int rc = Ask("list", directory); rc < 0) return rc;
    names->clear();
    for (const auto& [path, inode] : entries_) {
      if (Parent(path) == directory) names->push_back(path.substr(directory.size() + 1));
    }
    return 0;
  }
  int MakeDirectory(const std::string& path) override {
    const std::lock_guard lock(mutex_);
    if (const int rc = Ask("mkdir", path); rc < 0) return rc;
    return directories_.insert(path).second ? 0 : -EEXIST;
  }
  int Rename(const std::string& from, const std::string& to) override {
    const std::lock_guard lock(mutex_);
    if (const int rc = Ask("rename", from); rc < 0) return rc;
    const auto found = entries_.find(from);
    if (found == entries_.end()) return -ENOENT;
    auto inode = found->second;
    entries_.erase(found);
    entries_[to] = inode;
    return 0;
  }
  int Remove(const std::string& path) override {
    const std::lock_guard lock(mutex_);
    if (const int rc = Ask("unlink", path); rc < 0) return rc;
    return entries_.erase(path) == 1 ? 0 : -ENOENT;
  }
  int SyncDirectory(const std::string& path) override {
    const std::lock_guard lock(mutex_);
    if (const int rc = Ask("fsync directory", path); rc < 0) return rc;
    std::erase_if(durable_entries_, [&](const auto& entry) { return Parent(entry.first) == path; });
    for (const auto& entry : entries_) {
      if (Parent(entry.first) == path) durable_entries_.insert(entry);
    }
    for (const auto& directory : directories_) {
      if (Parent(directory) == path) durable_directories_.insert(directory);
    }
    return 0;
  }

  int SyncFileSystem(const std::string& path) override {
    const std::lock_guard lock(mutex_);
    if (const int rc = Ask("syncfs", path); rc < 0) return rc;
    durable_entries_ = entries_;
    durable_directories_ = directories_;
    for (auto& [name, inode] : entries_) inode->durable = inode->bytes;
    return 0;
  }

 private:
  struct Inode {
    std::vector<char> bytes;
    std::vector<char> durable;
  };

  class FakeFile : public io::RawFile {
   public:
    FakeFile(FaultFileSystem* fs, std::string path, std::shared_ptr<Inode> inode, bool direct)
        : fs_(fs), path_(std::move(path)), inode_(std::move(inode)), direct_(direct) {}

    ssize_t PRead(void* data, size_t size, int64_t offset) override {
      const std::lock_guard lock(fs_->mutex_);
      const int rc = fs_->Ask("pread", path_);
      if (rc < 0) return rc;
      const auto at = static_cast<size_t>(offset);
      if (at >= inode_->bytes.size()) return 0;
      size = std::min({size, inode_->bytes.size() - at, rc > 0 ? static_cast<size_t>(rc) : size});
      std::memcpy(data, inode_->bytes.data() + at, size);
      return static_cast<ssize_t>(size);
    }
    ssize_t PWrite(const void* data, size_t size, int64_t offset) override {
      const std::lock_guard lock(fs_->mutex_);
      const int rc = fs_->Ask("pwrite", path_);
      if (rc < 0) return rc;
      const auto at = static_cast<size_t>(offset);
      if (direct_ && !fs_->direct_write_supported) return -EINVAL;
      // As the kernel has it: address, size and offset in whole blocks.
      if (direct_ &&
          (at % 4096 != 0 || size % 4096 != 0 || reinterpret_cast<uintptr_t>(data) % 4096 != 0))
        return -EINVAL;
      if (rc > 0) size = std::min(size, static_cast<size_t>(rc));
      if (inode_->bytes.size() < at + size) inode_->bytes.resize(at + size);
      std::memcpy(inode_->bytes.data() + at, data, size);
      return static_cast<ssize_t>(size);
    }
    int64_t Size() override { return static_cast<int64_t>(inode_->bytes.size()); }
    int Truncate(int64_t size) override {
      const std::lock_guard lock(fs_->mutex_);
      if (const int rc = fs_->Ask("truncate", path_); rc < 0) return rc;
      inode_->bytes.resize(static_cast<size_t>(size));
      return 0;
    }
    int Allocate(int64_t size) override {
      const std::lock_guard lock(fs_->mutex_);
      if (const int rc = fs_->Ask("allocate", path_); rc < 0) return rc;
      if (inode_->bytes.size() < static_cast<size_t>(size))
        inode_->bytes.resize(static_cast<size_t>(size));
      return 0;
    }
    int Sync() override {
      const std::lock_guard lock(fs_->mutex_);
      if (const int rc = fs_->Ask("fsync", path_); rc < 0) return rc;
      inode_->durable = inode_->bytes;
      return 0;
    }
    int DisableDirect() override {
      direct_ = false;
      return 0;
    }
    int Close() override {
      const std::lock_guard lock(fs_->mutex_);
      return std::min(0, fs_->Ask("close", path_));
    }

   private:
    FaultFileSystem* fs_;
    std::string path_;
    std::shared_ptr<Inode> inode_;
    bool direct_;
  };

  static std::string Parent(const std::string& path) {
    const size_t slash = path.rfind('/');
    return slash == 0 ? "/" : path.substr(0, slash);
  }

  int Ask(const std::string& op, const std::string& path) {
    const int call = calls_++;
    const Fault fault = fault_;  // it may set another one
    return fault ? fault(op, path, call) : 0;
  }

  std::recursive_mutex mutex_;
  Fault fault_;
  int calls_ = 0;
  std::map<std::string, std::shared_ptr<Inode>> entries_, durable_entries_;
  std::set<std::string> directories_, durable_directories_;
};

}  // namespace hsdp_ckpt
