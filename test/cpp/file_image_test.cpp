#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <tuple>
#include <utility>

#include "base/aligned_buffer.h"
#include "base/crc32.h"
#include "base/error.h"
#include "format/record.h"
#include "io/file_system.h"
#include "shard_file_cases.h"

namespace hsdp_ckpt {
namespace {

/// Counts the bytes that are written from one stretch of memory.
class WatchedFile : public io::RawFile {
 public:
  WatchedFile(std::unique_ptr<io::RawFile> file, std::span<const std::byte> memory,
              std::atomic<int64_t>& bytes)
      : file_(std::move(file)), memory_(memory), bytes_(bytes) {}
  ssize_t PRead(void* data, size_t size, int64_t offset) override {
    return file_->PRead(data, size, offset);
  }
  ssize_t PWrite(const void* data, size_t size, int64_t offset) override {
    const auto* at = static_cast<const std::byte*>(data);
    if (at >= memory_.data() && at < memory_.data() + memory_.size())
      bytes_ += static_cast<int64_t>(size);
    return file_->PWrite(data, size, offset);
  }
  int64_t Size() override { return file_->Size(); }
  int Truncate(int64_t size) override { return file_->Truncate(size); }
  int Allocate(int64_t size) override { return file_->Allocate(size); }
  int Sync() override { return file_->Sync(); }
  int DisableDirect() override { return file_->DisableDirect(); }
  int Close() override { return file_->Close(); }

 private:
  std::unique_ptr<io::RawFile> file_;
  std::span<const std::byte> memory_;
  std::atomic<int64_t>& bytes_;
};

class WatchedFileSystem : public FaultFileSystem {
 public:
  int Open(const std::string& path, io::OpenMode mode,
           std::unique_ptr<io::RawFile>* file) override {
    const int rc = FaultFileSystem::Open(path, mode, file);
    if (rc == 0) *file = std::make_unique<WatchedFile>(std::move(*file), memory, bytes);
    return rc;
  }
  std::span<const std::byte> memory;
  std::atomic<int64_t> bytes{0};
};

using FileImageTest = ShardFileTest;

// Payloads in an image of the file, of all of it or of its middle, mixed with others that are not
// in it; in calls that end inside blocks. The rest of the image is filled with junk.
TEST_F(FileImageTest, AnImageMakesTheSameFileAndIsWrittenFromWhereItIs) {
  auto records = Various();
  WriteFile(fs_, records, {.block = 64 << 10});
  const auto whole = *fs_.Bytes("/d/" + kName.ToString());
  const auto length = static_cast<int64_t>(whole.size());
  const int64_t pages = (length + 4095) / 4096 * 4096;
  const base::AlignedBuffer memory(whole.size());
  for (const auto& [offset, end] : std::vector<std::pair<int64_t, int64_t>>{
           {0, pages}, {4096, pages}, {128 << 10, pages - (192 << 10)}, {3 << 20, pages}, {0, 0}}) {
    for (const auto& [direct, writes, block, batch] :
         std::vector<std::tuple<bool, bool, size_t, size_t>>{{true, true, 64 << 10, 1},
                                                             {true, true, 64 << 10, 7},
                                                             {true, true, 8 << 20, 1000},
                                                             {true, false, 64 << 10, 3},
                                                             {true, false, 1 << 20, 1},
                                                             {false, true, 64 << 10, 5}}) {
      WatchedFileSystem fs;
      fs.MakeDirectory("/d");
      fs.direct_write_supported = writes;
      const checkpoint::FileImage image{
          offset, memory.span().subspan(0, static_cast<size_t>(end - offset))};
      fs.memory = image.memory;
      std::fill(memory.span().begin(), memory.span().end(), std::byte{0xab});
      checkpoint::ShardFileWriter writer(
          fs, "/d", kName, {.threads = 3, .direct = direct, .block = block, .image = image});
      std::vector<checkpoint::RecordSource> sources;
      for (size_t i = 0; i < records.size(); ++i) {
        const Saved& saved = records[i];
        sources.push_back({saved.name, saved.dtype, saved.shape, saved.data});
        if (saved.dtype == nullptr || i % 5 == 0) continue;
        const int64_t at =
            saved.place.offset + format::SizeOfRecord(*saved.dtype, saved.shape).head;
        if (at < offset || at + static_cast<int64_t>(saved.data.size()) > end) continue;
        const auto there =
            image.memory.subspan(static_cast<size_t>(at - offset), saved.data.size());
        std::copy(saved.data.begin(), saved.data.end(), there.begin());
        sources.back().data = there;
      }
      for (size_t i = 0; i < sources.size(); i += batch) {
        writer.Write(std::span(sources).subspan(i, std::min(batch, sources.size() - i)));
      }
      EXPECT_EQ(writer.Finish().size, length);
      EXPECT_EQ(*fs.Bytes("/d/" + kName.ToString()), whole)
          << offset << " " << direct << writes << block << " " << batch;
      // All of it, but for blocks that only a part of lies in the image.
      const auto blocks = static_cast<int64_t>(block);
      if (direct && writes && block < 1 << 20) {
        EXPECT_GE(fs.bytes, end - offset - (offset % blocks == 0 ? 0 : blocks) - blocks) << offset;
      }
    }
  }
}

TEST_F(FileImageTest, KnownChecksumsOfAnImageAreNotComputedAgain) {
  for (const bool direct : {true, false}) {
    for (const uint32_t wrong : {0, 1}) {
      FaultFileSystem fs;
      fs.MakeDirectory("/d");
      std::vector<Saved> records{Random("w", "uint8", {300000}, 300000),
                                 Random("behind", "uint8", {100}, 100)};
      WriteFile(fs, records, {});
      const auto whole = *fs.Bytes("/d/" + kName.ToString());
      fs.Remove("/d/" + kName.ToString());
      const base::AlignedBuffer memory(512 << 10);
      std::vector<checkpoint::RecordSource> sources;
      for (const Saved& saved : records) {
        const int64_t at =
            saved.place.offset + format::SizeOfRecord(*saved.dtype, saved.shape).head;
        const auto there = memory.span().subspan(static_cast<size_t>(at), saved.data.size());
        std::copy(saved.data.begin(), saved.data.end(), there.begin());
        sources.push_back({saved.name, saved.dtype, saved.shape, there});
      }
      std::vector<uint32_t> sums;
      for (size_t at = 0; at < 300000; at += base::kChecksumBlock) {
        sums.push_back(
            base::Crc32(std::span(records[0].data)
                            .subspan(at, std::min<size_t>(base::kChecksumBlock, 300000 - at))));
      }
      sums[2] ^= wrong;
      const auto known = [&](const std::byte* payload) {
        return payload == sources[0].data.data() ? std::span<const uint32_t>(sums)
                                                 : std::span<const uint32_t>();
      };
      const checkpoint::FileImage image{0, memory.span(), known};
      checkpoint::ShardFileWriter writer(fs, "/d", kName, {.direct = direct, .image = image});
      writer.Write(sources);
      writer.Finish();
      EXPECT_EQ(*fs.Bytes("/d/" + kName.ToString()) == whole, wrong == 0);
      const Files files = Open(fs);
      if (wrong == 0) {
        EXPECT_EQ(ReadBack(files, records[0]), records[0].data);
      } else {
        EXPECT_THROW(ReadBack(files, records[0]),
                     base::CorruptionError);  // nobody has summed the bytes themselves
      }
      sums.pop_back();
      fs.Remove("/d/" + kName.ToString());
      checkpoint::ShardFileWriter another(fs, "/d", kName, {.direct = direct, .image = image});
      EXPECT_THROW(another.Write(sources), base::Error);
    }
  }
}

TEST_F(FileImageTest, DataAtAnotherPlaceInTheImageIsRefused) {
  const base::AlignedBuffer memory(64 << 10);
  const auto record = Random("w", "uint8", {100}, 100);
  const auto head = static_cast<size_t>(format::SizeOfRecord(*record.dtype, record.shape).head);
  for (const size_t at : {size_t{0}, head - 1, head + 64}) {
    checkpoint::ShardFileWriter writer(fs_, "/d", kName, {.image = {0, memory.span()}});
    EXPECT_THROW(writer.Write(std::vector{checkpoint::RecordSource{
                     "w", record.dtype, {100}, memory.span().subspan(at, 100)}}),
                 base::Error);
  }
  checkpoint::ShardFileWriter writer(fs_, "/d", kName, {.image = {0, memory.span()}});
  EXPECT_NO_THROW(writer.Write(std::vector{
      checkpoint::RecordSource{"w", record.dtype, {100}, memory.span().subspan(head, 100)}}));
}

}  // namespace
}  // namespace hsdp_ckpt
