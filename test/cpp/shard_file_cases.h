#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/load/read_plan.h"
#include "checkpoint/save/shard_file_writer.h"
#include "fault_file_system.h"
#include "format/record_dtype.h"

// Records for tests of data files, and how such a test writes and reads them.
namespace hsdp_ckpt {

struct Saved {
  std::string name;
  const format::RecordDtype* dtype;
  std::vector<int64_t> shape;
  std::vector<std::byte> data;
  checkpoint::ShardFileWriter::Place place{};
};

inline Saved Random(const std::string& name, const char* dtype, std::vector<int64_t> shape,
                    int64_t bytes) {
  Saved out{
      name, dtype == nullptr ? nullptr : format::FindRecordDtype(dtype), std::move(shape), {}};
  std::mt19937 random(static_cast<unsigned>(bytes) + 1);
  for (int64_t i = 0; i < bytes; ++i) out.data.push_back(static_cast<std::byte>(random()));
  return out;
}

// Payloads around every boundary there is: none, small, a checksum block, a write block, several of
// them.
inline std::vector<Saved> Various() {
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

inline const format::DataFileName kName{3, 0x1234, {1, 2, 3, 4}, false, 0};

inline checkpoint::WrittenFile WriteFile(io::FileSystem& fs, std::vector<Saved>& records,
                                         const checkpoint::WriterOptions& options,
                                         size_t batch = 1000) {
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

inline Files Open(io::FileSystem& fs, const std::string& name = kName.ToString()) {
  Files files;
  files.push_back(std::make_unique<checkpoint::ShardFileReader>(fs, "/d", name));
  return files;
}

inline std::vector<std::byte> ReadBack(const Files& files, const Saved& saved, int64_t first = 0,
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

}  // namespace hsdp_ckpt
