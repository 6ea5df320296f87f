// A whole checkpoint, data file and `.metadata`, with single bits flipped: at every byte of its
// structure, and at random.
#include <gtest/gtest.h>

#include <random>

#include "base/bytes.h"
#include "base/error.h"
#include "checkpoint/load/checkpoint_reader.h"
#include "checkpoint/load/load_planner.h"
#include "checkpoint/save/shard_file_writer.h"
#include "checkpoint/verify/verify.h"
#include "fault_file_system.h"
#include "format/metadata.h"
#include "format/record.h"

namespace hsdp_ckpt {
namespace {

struct Entry {
  std::string name;
  const format::RecordDtype* dtype;  // null: an object
  format::Dtype kind;
  format::Shape shape;
  std::vector<std::byte> data;
};

Entry Make(const std::string& name, const char* dtype, format::Dtype kind, format::Shape shape,
           int64_t bytes) {
  Entry out{name,
            dtype == nullptr ? nullptr : format::FindRecordDtype(dtype),
            kind,
            std::move(shape),
            {}};
  std::mt19937 random(static_cast<unsigned>(bytes) + 1);
  for (int64_t i = 0; i < bytes; ++i) out.data.push_back(static_cast<std::byte>(random()));
  return out;
}

class FlippedBitsTest : public testing::Test {
 protected:
  FlippedBitsTest() {
    fs_.MakeDirectory("/d");
    // Above a megabyte: its payload is page-aligned, with padding before it, and has many blocks.
    entries_.push_back(
        Make("large", "float32", format::Dtype::k_float32, {520, 512}, 520 * 512 * 4));
    entries_.push_back(Make("small", "float32", format::Dtype::k_float32, {5, 7}, 140));
    entries_.push_back(Make("half", "float16", format::Dtype::k_float16, {3}, 6));
    entries_.push_back(Make("object", nullptr, {}, {}, 300));
    const format::DataFileName name{0, 0x1234, {1, 2, 3, 4}, false, 0};
    std::vector<checkpoint::RecordSource> sources;
    for (const Entry& e : entries_) sources.push_back({e.name, e.dtype, e.shape, e.data});
    checkpoint::ShardFileWriter writer(fs_, "/d", name, {});
    const auto places = writer.Write(sources);
    writer.Finish();
    format::Metadata metadata;
    metadata.storage_data.emplace();
    for (size_t i = 0; i < entries_.size(); ++i) {
      const Entry& e = entries_[i];
      const format::Shape zeros(e.shape.size());
      format::EntryMetadata entry = format::BytesMetadata{};
      if (e.dtype != nullptr)
        entry = format::TensorMetadata{{e.kind, {}, {}, {}, {}, {}}, e.shape, {{zeros, e.shape}}};
      metadata.state_dict_metadata.emplace_back(e.name, entry);
      format::MetadataIndex index{e.name, {}, {}};
      if (e.dtype != nullptr) index.offset = zeros;
      metadata.storage_data->emplace_back(
          index, format::StorageInfo{name.ToString(), places[i].offset, places[i].length, {}});
    }
    payload_ = {places[0].offset + format::SizeOfRecord(*entries_[0].dtype, entries_[0].shape).head,
                520 * 512 * 4};
    data_ = "/d/" + name.ToString();
    const std::string bytes = format::EncodeMetadata(metadata);
    std::unique_ptr<io::RawFile> file;
    EXPECT_EQ(fs_.Open("/d/.metadata", io::OpenMode::kCreate, &file), 0);
    EXPECT_EQ(file->PWrite(bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
  }

  // What a load does with all of it. Throws Error; what it reads without one is what was saved.
  void Load() {
    const std::vector<char> metadata = *fs_.Bytes("/d/.metadata");
    const checkpoint::LoadPlanner planner(
        format::DecodeMetadata(std::as_bytes(std::span(metadata)), "/d/.metadata"), "/d/.metadata");
    checkpoint::CheckpointReader reader(fs_, "/d", true);
    std::vector<checkpoint::BoxRead> boxes;
    std::vector<std::vector<std::byte>> targets;
    for (const Entry& e : entries_) {
      targets.emplace_back(e.data.size());
      if (planner.Find(e.name) == nullptr) throw base::Error("no entry " + e.name);
      if (e.dtype == nullptr) {
        const format::StorageInfo& place = planner.PlaceOfObject(e.name);
        reader.Open(std::vector{place.relative_path}, 1);
        const checkpoint::RecordPlace record{e.name, place.relative_path, place.offset,
                                             place.length};
        targets.back() = reader.ReadObjects(std::vector{record}, 1)[0];
        continue;
      }
      for (const checkpoint::ChunkRead& read :
           planner.Plan(e.name, {format::Shape(e.shape.size()), e.shape})) {
        reader.Open(std::vector{read.place->relative_path}, 1);
        boxes.push_back(
            {{e.name, read.place->relative_path, read.place->offset, read.place->length},
             read.in_record,
             read.sizes,
             e.dtype,
             targets.back().data()});
      }
    }
    std::vector<checkpoint::PlannedRead> reads;
    for (checkpoint::BoxStrategy& strategy : reader.Resolve(boxes, 1)) {
      if (strategy.kind != checkpoint::BoxStrategy::Kind::kInPlace)
        throw base::Error("a record of another kind");
      reads.push_back(std::move(strategy.read));
    }
    checkpoint::ReadPlan(reader.files(), std::move(reads)).ReadAll(1);
    for (size_t i = 0; i < entries_.size(); ++i)
      EXPECT_EQ(targets[i], entries_[i].data) << entries_[i].name;
  }

  void ExpectNoticed(const std::string& path, size_t at, unsigned bit) {
    char& byte = fs_.Bytes(path)->at(at);
    byte = static_cast<char>(byte ^ (1 << bit));
    EXPECT_THROW(Load(), base::Error) << path << ", byte " << at << ", bit " << bit;
    EXPECT_FALSE(checkpoint::Verify(fs_, "/d", 1).problems.empty())
        << path << ", byte " << at << ", bit " << bit;
    byte = static_cast<char>(byte ^ (1 << bit));
  }

  FaultFileSystem fs_;
  std::vector<Entry> entries_;
  std::string data_;
  std::pair<int64_t, int64_t>
      payload_;  // of the large tensor: where it begins in the file, and its length in bytes
};

TEST_F(FlippedBitsTest, EveryByteOfTheStructureIsChecked) {
  std::mt19937 random(1);
  size_t places = 0;
  const auto size = static_cast<int64_t>(fs_.Bytes(data_)->size());
  for (int64_t at = 0; at < size; ++at, ++places) {
    if (at == payload_.first) at += payload_.second;
    ExpectNoticed(data_, static_cast<size_t>(at), random() % 8);
  }
  for (size_t at = 0; at < fs_.Bytes("/d/.metadata")->size(); ++at, ++places)
    ExpectNoticed("/d/.metadata", at, random() % 8);
  EXPECT_GT(places, 4000u);
  EXPECT_NO_THROW(Load());
  EXPECT_EQ(checkpoint::Verify(fs_, "/d", 1).problems, std::vector<checkpoint::VerifyProblem>{});
}

TEST_F(FlippedBitsTest, TwoThousandRandomPlacesAreChecked) {
  std::mt19937 random(2);
  const size_t size = fs_.Bytes(data_)->size();
  for (int i = 0; i < 2000; ++i) ExpectNoticed(data_, random() % size, random() % 8);
}

}  // namespace
}  // namespace hsdp_ckpt
