#include "io/file.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/parallel.h"
#include "fault_file_system.h"

namespace hsdp_ckpt {
namespace {

// A file of 1 GiB that shows one block until it is read, as storage in tiers does of a file that
// lies on tape; `comes_back`: the read brings it back.
class Released : public io::RawFile {
 public:
  explicit Released(bool comes_back) : comes_back_(comes_back) {}
  ssize_t PRead(void*, size_t size, int64_t) override {
    is_back_ = comes_back_;
    return static_cast<ssize_t>(size);
  }
  int64_t Allocated() override { return is_back_ ? Size() : 512; }
  int64_t Size() override { return int64_t{1} << 30; }
  ssize_t PWrite(const void*, size_t, int64_t) override { return -EIO; }
  int Truncate(int64_t) override { return 0; }
  int Allocate(int64_t) override { return 0; }
  int Sync() override { return 0; }
  int DisableDirect() override { return 0; }
  int Close() override { return 0; }

 private:
  bool comes_back_;
  bool is_back_ = false;
};

class ReleasedSystem : public FaultFileSystem {
 public:
  explicit ReleasedSystem(bool comes_back) : comes_back_(comes_back) {}
  int Open(const std::string&, io::OpenMode, std::unique_ptr<io::RawFile>* file) override {
    *file = std::make_unique<Released>(comes_back_);
    return 0;
  }

 private:
  bool comes_back_;
};

TEST(FileTest, AFileOnAnotherTierOfStorageIsReadBeforeItIsTakenForHoles) {
  for (const bool comes_back : {true, false}) {
    ReleasedSystem fs(comes_back);
    const io::File file = io::File::Open(fs, "/file", io::OpenMode::kRead);
    const auto check = [&] { io::CheckNotHoles(file, file.Size(), "a record"); };
    if (comes_back) {
      EXPECT_NO_THROW(check());
      continue;
    }
    try {
      check();
      FAIL() << "1 GiB of holes were taken for bytes";
    } catch (const base::CorruptionError&) {
      FAIL() << "what lies elsewhere is not damaged";
    } catch (const base::Error& error) {
      EXPECT_NE(std::string(error.what()).find("/file: a record: a file of holes"),
                std::string::npos);
    }
  }
}

// A file system that refuses direct writes only after all threads have issued theirs: each is
// refused, one turns it off.
TEST(FileTest, SeveralThreadsWhoseDirectWritesAreRefusedGoOn) {
  std::atomic<int> waiting{0};
  class Late : public io::RawFile {
   public:
    explicit Late(std::atomic<int>& waiting) : waiting_(waiting) {}
    ssize_t PRead(void*, size_t, int64_t) override { return 0; }
    ssize_t PWrite(const void*, size_t size, int64_t) override {
      if (++waiting_ > 2) return static_cast<ssize_t>(size);
      while (waiting_ < 2) std::this_thread::yield();
      return -EINVAL;
    }
    int64_t Size() override { return 0; }
    int Truncate(int64_t) override { return 0; }
    int Allocate(int64_t) override { return 0; }
    int Sync() override { return 0; }
    int DisableDirect() override { return 0; }
    int Close() override { return 0; }

   private:
    std::atomic<int>& waiting_;
  };
  class LateSystem : public FaultFileSystem {
   public:
    explicit LateSystem(std::atomic<int>& waiting) : waiting_(waiting) {}
    int Open(const std::string&, io::OpenMode, std::unique_ptr<io::RawFile>* file) override {
      *file = std::make_unique<Late>(waiting_);
      return 0;
    }

   private:
    std::atomic<int>& waiting_;
  };
  LateSystem fs(waiting);
  io::File file = io::File::Open(fs, "/d/x", io::OpenMode::kCreateDirect);
  const std::vector<std::byte> page(4096);
  EXPECT_NO_THROW(base::ParallelFor(
      2, 2, [&](size_t i) { file.WriteAt(page, static_cast<int64_t>(i) * 4096); }));
  EXPECT_FALSE(file.direct());
  EXPECT_EQ(waiting, 4);
}

}  // namespace
}  // namespace hsdp_ckpt
