#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <random>
#include <utility>

#include "base/error.h"
#include "format/record.h"
#include "io/file.h"
#include "shard_file_cases.h"

namespace hsdp_ckpt {
namespace {

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

}  // namespace
}  // namespace hsdp_ckpt
