#pragma once

#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "io/file_system.h"

namespace hsdp_ckpt::io {

/// A file system whose files opened for reading by OpenInside are open only as far as there is room
/// for their descriptors: the ones that were used last. The others are opened again at their next
/// call, which is -ESTALE if there is another file by then. All other calls go to the file system
/// beneath.
///
/// Half of the descriptors that the process may have are taken at the most, and fewer where there
/// are no more to be had. It outlives its files. Thread-safe.
class FilePool final : public FileSystem {
 public:
  explicit FilePool(FileSystem& fs) : FilePool(fs, MostOfProcess()) {}
  FilePool(FileSystem& fs, size_t most) : fs_(fs), most_(most) {}

  int OpenInside(const std::string& directory, const std::string& name, OpenMode mode,
                 std::unique_ptr<RawFile>* file) override;

  int Open(const std::string& path, OpenMode mode, std::unique_ptr<RawFile>* file) override {
    return fs_.Open(path, mode, file);
  }
  bool IsInMemory(const std::string& path) override { return fs_.IsInMemory(path); }
  int Status(const std::string& path, FileStatus* status) override {
    return fs_.Status(path, status);
  }
  int List(const std::string& directory, std::vector<std::string>* names) override {
    return fs_.List(directory, names);
  }
  int MakeDirectory(const std::string& path) override { return fs_.MakeDirectory(path); }
  int Rename(const std::string& from, const std::string& to) override {
    return fs_.Rename(from, to);
  }
  int Remove(const std::string& path) override { return fs_.Remove(path); }
  int SyncDirectory(const std::string& path) override { return fs_.SyncDirectory(path); }
  int SyncFileSystem(const std::string& path) override { return fs_.SyncFileSystem(path); }

 private:
  class PooledFile;
  struct Opened;

  static size_t MostOfProcess();
  int OpenWithRoom(const Opened& what, std::unique_ptr<RawFile>* file);
  std::shared_ptr<RawFile> Keep(PooledFile* file, std::unique_ptr<RawFile> raw);
  void Forget(PooledFile* file);
  void CloseOldest(size_t left);

  FileSystem& fs_;
  const size_t most_;
  std::mutex mutex_;
  std::list<PooledFile*> open_;  // the one that was used last is the first
};

}  // namespace hsdp_ckpt::io
