#include <gtest/gtest.h>

#include <atomic>
#include <random>
#include <thread>
#include <utility>

#include "base/bytes.h"
#include "base/crc32.h"
#include "base/error.h"
#include "base/parallel.h"
#include "checkpoint/load/read_plan.h"
#include "checkpoint/save/shard_file_writer.h"
#include "fault_file_system.h"
#include "format/record.h"
#include "format/tensor_pickle.h"
#include "io/file.h"

namespace hsdp_ckpt {
namespace {

struct Saved {
  std::string name;
  const format::RecordDtype* dtype;
  std::vector<int64_t> shape;
  std::vector<std::byte> data;
  checkpoint::ShardFileWriter::Place place{};
};

Saved Random(const std::string& name, const char* dtype, std::vector<int64_t> shape,
             int64_t bytes) {
  Saved out{
      name, dtype == nullptr ? nullptr : format::FindRecordDtype(dtype), std::move(shape), {}};
  std::mt19937 random(static_cast<unsigned>(bytes) + 1);
  for (int64_t i = 0; i < bytes; ++i) out.data.push_back(static_cast<std::byte>(random()));
  return out;
}

// Payloads around every boundary there is: none, small, a checksum block, a write block, several of
// them.
std::vector<Saved> Various() {
  constexpr int64_t kMiB = 1 << 20;
  std::vector<Saved> out;
  out.push_back(Random("object", nullptr, {}, 777));
  out.push_back(Random("no bytes", nullptr, {}, 0));
  out.push_back(Random("scalar", "int64", {}, 8));
  out.push_back(Random("empty", "float32", {0, 5}, 0));
  out.push_back(Random("just below", "uint8", {kMiB - 1}, kMiB - 1));
  out.push_back(Random("just large", "uint8", {kMiB}, kMiB));
  for (int i = 0; i < 40; ++i)
    out.push_back(Random("tiny" + std::to_string(i), "float16", {i, 3}, 6 * i));
  out.push_back(Random("large", "float32", {2303, 1025}, 2303 * 1025 * 4));
  out.push_back(Random("behind", "bool", {100}, 100));
  return out;
}

const format::DataFileName kName{3, 0x1234, {1, 2, 3, 4}, false, 0};

checkpoint::WrittenFile WriteFile(io::FileSystem& fs, std::vector<Saved>& records,
                                  const checkpoint::WriterOptions& options, size_t batch = 1000) {
  checkpoint::ShardFileWriter writer(fs, "/d", kName, options);
  for (size_t i = 0; i < records.size(); i += batch) {
    std::vector<checkpoint::RecordSource> sources;
    for (size_t j = i; j < std::min(records.size(), i + batch); ++j) {
      sources.push_back({records[j].name, records[j].dtype, records[j].shape, records[j].data});
    }
    const auto places = writer.Write(sources);
    for (size_t j = 0; j < places.size(); ++j) records[i + j].place = places[j];
  }
  return writer.Finish();
}

using Files = std::vector<std::unique_ptr<checkpoint::ShardFileReader>>;

Files Open(io::FileSystem& fs, const std::string& name = kName.ToString()) {
  Files files;
  files.push_back(std::make_unique<checkpoint::ShardFileReader>(fs, "/d", name));
  return files;
}

std::vector<std::byte> ReadBack(const Files& files, const Saved& saved, int64_t first = 0,
                                int64_t size = -1) {
  if (saved.dtype == nullptr)
    return files[0]->ReadBytes(saved.name, saved.place.offset, saved.place.length);
  std::vector<std::byte> out(size < 0 ? saved.data.size() : static_cast<size_t>(size));
  const auto tensor = files[0]->Describe(saved.name, saved.place.offset, saved.place.length);
  EXPECT_EQ(tensor->shape, saved.shape);
  const auto wanted = static_cast<int64_t>(out.size());
  checkpoint::ReadPlan plan(
      files,
      {{0, {saved.name, saved.place.offset, saved.place.length, first, wanted, out.data()}}});
  plan.ReadAll(3);
  return out;
}

class ShardFileTest : public testing::Test {
 protected:
  ShardFileTest() { fs_.MakeDirectory("/d"); }
  FaultFileSystem fs_;
};

struct Mode {
  bool direct, direct_open, direct_write;
  size_t block, batch;
};

class ShardFileModes : public ShardFileTest, public testing::WithParamInterface<Mode> {};

TEST_P(ShardFileModes, RoundTrip) {
  const Mode mode = GetParam();
  fs_.direct_supported = mode.direct_open;
  fs_.direct_write_supported = mode.direct_write;
  auto records = Various();
  const auto written = WriteFile(
      fs_, records, {.threads = 3, .direct = mode.direct, .reserve = 30 << 20, .block = mode.block},
      mode.batch);
  EXPECT_EQ(written.direct, mode.direct && mode.direct_open && mode.direct_write);
  EXPECT_EQ(written.size, static_cast<int64_t>(fs_.Bytes("/d/" + kName.ToString())->size()));
  const Files reader = Open(fs_);
  for (const auto& saved : records) {
    EXPECT_EQ(ReadBack(reader, saved), saved.data) << saved.name;
    if (saved.dtype == nullptr) continue;
    const format::RecordSize size = format::SizeOfRecord(*saved.dtype, saved.shape);
    EXPECT_EQ(size.total(), saved.place.length);
    EXPECT_EQ(
        (saved.place.offset + size.head) % (size.payload >= format::kLargePayload ? 4096 : 64), 0);
  }
  const auto& large = records[records.size() - 2];
  for (const auto& [first, size] : std::vector<std::pair<int64_t, int64_t>>{
           {0, 1}, {1048575, 2}, {5000, 3000000}, {9442299, 1}}) {
    const std::vector<std::byte> expected(large.data.begin() + first,
                                          large.data.begin() + first + size);
    EXPECT_EQ(ReadBack(reader, large, first, size), expected);
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, ShardFileModes,
    testing::Values(Mode{true, true, true, 8 << 20, 1000}, Mode{true, true, true, 64 << 10, 7},
                    Mode{true, true, true, 1 << 20, 1}, Mode{true, true, false, 1 << 20, 5},
                    Mode{true, false, true, 64 << 10, 3}, Mode{false, true, true, 8 << 20, 1000}));

// Payloads cut into parts at odd places, in calls that end inside a payload.
TEST_F(ShardFileTest, PartsOfPayloadsMakeTheSameFile) {
  auto records = Various();
  WriteFile(fs_, records, {.block = 64 << 10});
  const auto whole = *fs_.Bytes("/d/" + kName.ToString());
  for (const bool direct : {true, false}) {
    fs_.Remove("/d/" + kName.ToString());
    std::mt19937 random(8);
    checkpoint::ShardFileWriter writer(fs_, "/d", kName,
                                       {.threads = 3, .direct = direct, .block = 64 << 10});
    std::vector<checkpoint::RecordSource> parts;
    size_t places = 0;
    for (const auto& record : records) {
      const auto size = static_cast<int64_t>(record.data.size());
      int64_t first = 0;
      do {
        const int64_t take =
            record.dtype == nullptr ? size : std::min<int64_t>(size - first, 1 + random() % 900000);
        parts.push_back(
            {record.name, record.dtype, record.shape,
             std::span(record.data).subspan(static_cast<size_t>(first), static_cast<size_t>(take)),
             first});
        first += take;
        if (random() % 3 == 0) places += writer.Write(std::exchange(parts, {})).size();
      } while (first < size);
    }
    places += writer.Write(parts).size();
    EXPECT_EQ(places, records.size());
    writer.Finish();
    EXPECT_EQ(*fs_.Bytes("/d/" + kName.ToString()), whole);
  }
}

TEST_F(ShardFileTest, PartsThatDoNotFitAreRefused) {
  const auto record = Random("w", "uint8", {100}, 100);
  const auto part = [&](int64_t first, size_t size, const std::string& name = "w") {
    return checkpoint::RecordSource{name, record.dtype, record.shape,
                                    std::span(record.data).first(size), first};
  };
  const std::vector<std::vector<checkpoint::RecordSource>> wrong{{part(1, 50)},
                                                                 {part(0, 50), part(40, 50)},
                                                                 {part(0, 50), part(0, 100)},
                                                                 {part(0, 50), part(50, 100)},
                                                                 {part(0, 0)},
                                                                 {part(0, 50), part(50, 50, "v")}};
  for (const auto& records : wrong) {
    checkpoint::ShardFileWriter writer(fs_, "/d", kName, {});
    EXPECT_THROW(writer.Write(records), base::Error);
  }
  checkpoint::ShardFileWriter writer(fs_, "/d", kName, {});
  writer.Write(std::vector{part(0, 50)});
  EXPECT_THROW(writer.Finish(), base::Error);
}

TEST_F(ShardFileTest, EveryModeWritesTheSameBytes) {
  std::vector<std::vector<char>> files;
  for (const bool direct : {true, false}) {
    for (const size_t batch : {1, 1000}) {
      auto records = Various();
      WriteFile(fs_, records, {.threads = 2, .direct = direct, .block = 128 << 10}, batch);
      files.push_back(*fs_.Bytes("/d/" + kName.ToString()));
      fs_.Remove("/d/" + kName.ToString());
    }
  }
  for (const auto& file : files) EXPECT_EQ(file, files[0]);
}

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

// Payloads in an image of the file, of all of it or of its middle, mixed with others that are not
// in it; in calls that end inside blocks. The rest of the image is filled with junk.
TEST_F(ShardFileTest, AnImageMakesTheSameFileAndIsWrittenFromWhereItIs) {
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

TEST_F(ShardFileTest, KnownChecksumsOfAnImageAreNotComputedAgain) {
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

TEST_F(ShardFileTest, DataAtAnotherPlaceInTheImageIsRefused) {
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

// Reads everything; the first damage throws.
void ReadAll(io::FileSystem& fs, const std::vector<Saved>& records) {
  const Files reader = Open(fs);
  for (const auto& saved : records) {
    if (saved.dtype != nullptr &&
        !reader[0]->Describe(saved.name, saved.place.offset, saved.place.length)) {
      throw base::CorruptionError("", saved.name, "a tensor", "none");
    }
    ReadBack(reader, saved);
  }
}

TEST_F(ShardFileTest, EveryFlippedByteOfAFileIsNoticed) {
  std::vector<Saved> records{Random("object", nullptr, {}, 100),
                             Random("a", "float32", {7, 5}, 140), Random("b", "uint16", {3}, 6)};
  WriteFile(fs_, records, {});
  auto& bytes = *fs_.Bytes("/d/" + kName.ToString());
  size_t noticed = 0;
  for (size_t i = 0; i < bytes.size(); ++i) {  // records, padding, index and tail
    bytes[i] = static_cast<char>(bytes[i] ^ (1 << i % 8));
    try {
      ReadAll(fs_, records);
      ADD_FAILURE() << "byte " << i << " of " << bytes.size();
    } catch (const base::CorruptionError&) {
      ++noticed;
    }
    bytes[i] = static_cast<char>(bytes[i] ^ (1 << i % 8));
  }
  EXPECT_EQ(noticed, bytes.size());
  EXPECT_GT(bytes.size(), 1000u);
  EXPECT_NO_THROW(ReadAll(fs_, records));
}

TEST_F(ShardFileTest, FlippedBitsOfALargePayloadAreNoticedWhereTheyAreReadAndOnlyThere) {
  std::vector<Saved> records{Random("w", "uint8", {5 << 20}, 5 << 20)};
  WriteFile(fs_, records, {});
  auto& bytes = *fs_.Bytes("/d/" + kName.ToString());
  bytes[3 << 20] = static_cast<char>(bytes[3 << 20] ^ 4);  // in one of the payload's blocks
  const Files reader = Open(fs_);
  EXPECT_THROW(ReadBack(reader, records[0]), base::CorruptionError);
  EXPECT_NO_THROW(ReadBack(reader, records[0], 0, 1 << 20));
}

TEST_F(ShardFileTest, TruncatedAtEveryLengthIsNoticed) {
  std::vector<Saved> records{Random("a", "float32", {7, 5}, 140)};
  WriteFile(fs_, records, {});
  auto& bytes = *fs_.Bytes("/d/" + kName.ToString());
  while (!bytes.empty()) {
    bytes.pop_back();
    EXPECT_THROW(ReadAll(fs_, records), base::CorruptionError) << bytes.size();
  }
}

TEST_F(ShardFileTest, AFileOfAnotherSaveIsNoticed) {
  auto records = std::vector<Saved>{Random("a", "float32", {3}, 12)};
  WriteFile(fs_, records, {});
  format::DataFileName other = kName;
  other.save_id = 99;
  fs_.Rename("/d/" + kName.ToString(), "/d/" + other.ToString());
  EXPECT_THROW(Open(fs_, other.ToString()), base::CorruptionError);
}

TEST_F(ShardFileTest, NothingIsOverwritten) {
  auto records = std::vector<Saved>{Random("a", "float32", {3}, 12)};
  WriteFile(fs_, records, {});
  EXPECT_THROW(WriteFile(fs_, records, {}), base::IoError);
  EXPECT_NO_THROW(ReadAll(fs_, records));
}

TEST_F(ShardFileTest, InterruptedAndShortCallsChangeNothing) {
  auto records = Various();
  std::mt19937 random(5);
  fs_.set_fault([&](const std::string& op, const std::string&, int) {
    if (random() % 3 == 0) return op == "close" ? 0 : -EINTR;
    return random() % 3 == 0 && (op == "pwrite" || op == "pread")
               ? static_cast<int>(random() % 500000 + 1)
               : 0;
  });
  WriteFile(fs_, records, {.block = 256 << 10});
  const Files reader = Open(fs_);
  for (const auto& saved : records) EXPECT_EQ(ReadBack(reader, saved), saved.data) << saved.name;
}

TEST_F(ShardFileTest, AFailedCallNamesItsFileAndLeavesNone) {
  for (const int error : {ENOSPC, EIO, EROFS, EDQUOT}) {
    for (const char* op : {"open", "allocate", "pwrite", "truncate", "fsync", "close"}) {
      auto records = Various();
      fs_.set_fault([&](const std::string& call, const std::string&, int) {
        return call == op ? -error : 0;
      });
      try {
        WriteFile(fs_, records, {.threads = 3, .reserve = 1000, .block = 64 << 10}, 4);
        ADD_FAILURE() << op;
      } catch (const base::IoError& got) {
        EXPECT_EQ(got.error_number(), error) << op;
        EXPECT_EQ(got.path(), "/d/" + kName.ToString());
      }
      EXPECT_EQ(fs_.Bytes("/d/" + kName.ToString()), nullptr) << op;
    }
  }
}

TEST(TensorPickleTest, FewBytesMakeNoDeepOrLargeValue) {
  const auto decode = [](const std::string& opcodes) {
    return format::DecodeTensorPickle(base::AsBytes("\x80\x02" + opcodes + "."));
  };
  const std::string valid(base::AsText(format::EncodeTensorPickle(
      format::ContiguousTensor(*format::FindRecordDtype("float32"), std::vector<int64_t>{2, 3}))));
  ASSERT_TRUE(decode(valid.substr(2, valid.size() - 3)));
  std::string deep = ")", doubled = ")q" + std::string(1, '\0'),
              repeated = "X" + std::string("\0\x40\0\0", 4);
  deep.append(60000, '\x85');
  for (int i = 0; i < 60; ++i) doubled += std::string("h\0h\0\x86q\0", 7);
  repeated += std::string(0x4000, 'x') + std::string("q\0", 2);
  for (int i = 0; i < 20000; ++i) repeated += std::string("h\0", 2);
  for (const auto& opcodes : {deep, doubled, repeated}) EXPECT_FALSE(decode(opcodes));
}

TEST(TensorPickleTest, StridesOfAnEmptyTensorHaveToFit) {
  const std::vector<int64_t> shape{0, int64_t{1} << 62, 4};
  EXPECT_THROW(format::ContiguousTensor(*format::FindRecordDtype("uint8"), shape), base::Error);
  EXPECT_EQ(format::ContiguousTensor(*format::FindRecordDtype("uint8"), std::vector<int64_t>{0, 7})
                .stride,
            (std::vector<int64_t>{7, 1}));
}

// A file system that refuses direct writes only after all threads have issued theirs: each is
// refused, one turns it off.
TEST_F(ShardFileTest, SeveralThreadsWhoseDirectWritesAreRefusedGoOn) {
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
