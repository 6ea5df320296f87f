#include "checkpoint/save/save_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>

#include "base/bytes.h"
#include "base/error.h"
#include "checkpoint/save/replica_split.h"
#include "checkpoint/save/shard_file_writer.h"
#include "fault_file_system.h"
#include "format/tensor_pickle.h"

namespace hsdp_ckpt {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
const format::RecordDtype* const kFloat = format::FindRecordDtype("float32");

std::vector<int64_t> Ranks(int64_t count, int64_t first = 0) {
  std::vector<int64_t> ranks(static_cast<size_t>(count));
  std::iota(ranks.begin(), ranks.end(), first);
  return ranks;
}

// replicas x shards; tensors are sharded on dimension `dim`.
checkpoint::Sharding Hybrid(int64_t replicas, int64_t shards, int64_t dim = 0) {
  return {{replicas, shards}, Ranks(replicas * shards), {-1, dim}};
}

checkpoint::SharedShape Shared(format::Shape shape) {
  return std::make_shared<const format::Shape>(std::move(shape));
}

int64_t BytesOf(const checkpoint::SavePlan& plan, const checkpoint::ChunkList& pieces) {
  int64_t bytes = 0;
  for (const checkpoint::PlannedChunk& chunk : pieces)
    bytes += format::TensorBytes(*plan.tensors()[chunk.tensor].dtype, chunk.sizes);
  return bytes;
}

// Whether the pieces of all ranks cover each tensor once; how many elements there are of each.
void ExpectCovered(const checkpoint::SavePlan& plan, int64_t ranks) {
  std::map<size_t, std::vector<int>> counts;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    for (const checkpoint::PlannedChunk& chunk : plan.ChunksOf(rank)) {
      const format::Shape& size = *plan.tensors()[chunk.tensor].size;
      auto& count = counts[chunk.tensor];
      count.resize(
          static_cast<size_t>(format::TensorBytes(*format::FindRecordDtype("uint8"), size)));
      format::Shape at = chunk.offsets;
      const int64_t elements = format::TensorBytes(*format::FindRecordDtype("uint8"), chunk.sizes);
      for (int64_t n = 0; n < elements; ++n) {
        int64_t flat = 0;
        for (size_t d = 0; d < size.size(); ++d) flat = flat * size[d] + at[d];
        ++count.at(static_cast<size_t>(flat));
        for (size_t d = at.size();
             d > 0 && ++at[d - 1] == chunk.offsets[d - 1] + chunk.sizes[d - 1]; --d) {
          at[d - 1] = chunk.offsets[d - 1];
        }
      }
    }
  }
  ASSERT_EQ(counts.size(), plan.tensors().size());
  for (const auto& [tensor, count] : counts) {
    EXPECT_THAT(count, testing::Each(1)) << plan.tensors()[tensor].fqn;
  }
}

TEST(SavePlanTest, EveryElementIsWrittenOnce) {
  std::mt19937 random(3);
  for (int round = 0; round < 30; ++round) {
    const auto pick = [&](int64_t low, int64_t high) {
      return low + static_cast<int64_t>(random() % (high - low + 1));
    };
    std::vector<checkpoint::PlannedTensor> tensors;
    const int64_t replicas = pick(1, 4), shards = pick(1, 5);
    const std::vector<checkpoint::Sharding> shardings{
        Hybrid(replicas, shards),
        {{replicas * shards}, Ranks(replicas * shards), {-1}},
        Hybrid(replicas, shards, 1)};
    for (int64_t i = 0; i < 12; ++i) {
      format::Shape size{pick(0, 1) == 0 ? 1 : pick(1, 300), pick(1, 400), pick(1, 3)};
      tensors.push_back(
          {"w" + std::to_string(i), kFloat, Shared(size), static_cast<size_t>(pick(0, 2))});
    }
    tensors.push_back({"scalar", kFloat, Shared({}), 1});
    tensors.push_back({"empty", kFloat, Shared({0, 5}), 0});
    ExpectCovered(checkpoint::SavePlan(shardings, tensors), replicas * shards);
  }
}

// How often the ranks' local shards hold each element of a plan's only tensor, of one byte each.
std::vector<int64_t> Held(const checkpoint::SavePlan& plan, int64_t ranks) {
  const format::Shape& size = *plan.tensors().at(0).size;
  std::vector<int64_t> held(static_cast<size_t>(checkpoint::Product(size)));
  for (int64_t rank = 0; rank < ranks; ++rank) {
    for (const checkpoint::PlannedChunk& shard : plan.LocalShards(rank)) {
      for (int64_t n = 0; n < checkpoint::Product(shard.sizes); ++n) {
        int64_t flat = 0, rest = n, stride = 1;
        for (size_t d = size.size(); d > 0; --d) {
          flat += (shard.offsets[d - 1] + rest % shard.sizes[d - 1]) * stride;
          rest /= shard.sizes[d - 1];
          stride *= size[d - 1];
        }
        ++held.at(static_cast<size_t>(flat));
      }
    }
  }
  return held;
}

TEST(SavePlanTest, AnyMeshHoldsEachElementOnceAReplicaAndWritesItOnce) {
  std::mt19937 random(5);
  const auto pick = [&](int64_t low, int64_t high) {
    return low + static_cast<int64_t>(random() % static_cast<uint64_t>(high - low + 1));
  };
  for (int round = 0; round < 500; ++round) {
    checkpoint::Sharding sharding;
    format::Shape size(static_cast<size_t>(pick(1, 3)));
    for (int64_t& each : size) each = pick(1, 9);
    int64_t replicas = 1;
    for (int64_t dims = pick(1, 5); dims > 0; --dims) {
      sharding.mesh_shape.push_back(pick(1, 3));
      sharding.shard_dims.push_back(pick(-1, static_cast<int64_t>(size.size()) - 1));
      if (sharding.shard_dims.back() < 0) replicas *= sharding.mesh_shape.back();
    }
    const int64_t ranks = checkpoint::Product(sharding.mesh_shape);
    sharding.ranks = Ranks(ranks);
    std::shuffle(sharding.ranks.begin(), sharding.ranks.end(), random);
    const checkpoint::SavePlan plan({sharding},
                                    {{"w", format::FindRecordDtype("uint8"), Shared(size), 0}});
    EXPECT_THAT(Held(plan, ranks), testing::Each(replicas)) << "round " << round;
    ExpectCovered(plan, ranks);
  }
}

TEST(SavePlanTest, RowsLargerThanAGrainAreCutInside) {
  for (const format::Shape& size : {format::Shape{2, 3, 1 << 20}, format::Shape{1, 1, 5 << 20},
                                    format::Shape{5 << 20}, format::Shape{1, 3, 2, 1 << 19}}) {
    const checkpoint::SavePlan plan({{{4}, Ranks(4), {-1}}}, {{"w", kFloat, Shared(size), 0}});
    ExpectCovered(plan, 4);
    const int64_t total = format::TensorBytes(*kFloat, size);
    for (int64_t rank = 0; rank < 4; ++rank) {
      EXPECT_NEAR(static_cast<double>(BytesOf(plan, plan.ChunksOf(rank))),
                  static_cast<double>(total) / 4.0, kMiB);
      EXPECT_LE(plan.ChunksOf(rank).size(), 5u);
    }
  }
}

TEST(SavePlanTest, TensorsWhoseReplicasMayDifferAreNotCut) {
  const std::vector<checkpoint::PlannedTensor> tensors{{"a", kFloat, Shared({1 << 17}), 0},
                                                       {"b", kFloat, Shared({3, 1 << 16}), 0},
                                                       {"c", kFloat, Shared({}), 0},
                                                       {"d", kFloat, Shared({5 << 16}), 0}};
  for (const int64_t ranks : {1, 2, 3, 8}) {
    const checkpoint::SavePlan plan({{{ranks}, Ranks(ranks), {-1}, true}}, tensors);
    ExpectCovered(plan, ranks);
    if (ranks <= 3) {
      EXPECT_FALSE(plan.ChunksOf(ranks - 1).empty()) << "nothing is left for the last rank";
    }
    for (int64_t rank = 0; rank < ranks; ++rank) {
      for (const checkpoint::PlannedChunk& chunk : plan.ChunksOf(rank))
        EXPECT_EQ(chunk.sizes, *tensors[chunk.tensor].size);
    }
  }
}

TEST(SavePlanTest, RanksAreBalancedAndTheMetadataHardlyGrows) {
  // A few large tensors; many of all sizes; many small ones; large rows.
  std::mt19937 random(1);
  std::vector<std::vector<format::Shape>> states{
      {{50000, 1024}}, {{32, 1 << 20}, {7}}, {{1000, 30000}, {30000, 1000}, {3}}, {}, {}};
  for (int i = 0; i < 200; ++i)
    states[3].push_back({static_cast<int64_t>(1 + random() % 4000), 1024});
  for (int i = 0; i < 5000; ++i) states[4].push_back({1024});
  for (const auto& state : states) {
    for (const int64_t replicas : {1, 2, 3, 8}) {
      std::vector<checkpoint::PlannedTensor> tensors;
      for (const format::Shape& size : state)
        tensors.push_back({std::to_string(tensors.size()), kFloat, Shared(size), 0});
      const checkpoint::SavePlan plan({Hybrid(replicas, 4)}, tensors);
      size_t pieces = 0, shards = 0;
      for (int64_t shard = 0; shard < 4; ++shard) {
        int64_t whole = 0;
        for (const checkpoint::PlannedChunk& local : plan.LocalShards(shard)) {
          whole += format::TensorBytes(*kFloat, local.sizes);
          shards += format::TensorBytes(*kFloat, local.sizes) > 0 ? 1 : 0;
        }
        for (int64_t replica = 0; replica < replicas; ++replica) {
          const auto mine = plan.ChunksOf(replica * 4 + shard);
          const double share = static_cast<double>(whole) / static_cast<double>(replicas);
          EXPECT_NEAR(static_cast<double>(BytesOf(plan, mine)), share,
                      std::max<double>(kMiB, 0.02 * share));
          pieces += mine.size();
        }
      }
      // A cut adds a chunk, or up to three where it goes through a row longer than the grain.
      const int64_t per_cut = state.size() > 1 && state[0] == format::Shape{32, 1 << 20} ? 3 : 1;
      EXPECT_LE(pieces, shards + static_cast<size_t>(4 * per_cut * (replicas - 1)));
    }
  }
}

TEST(SavePlanTest, OnlyRanksOfTheGroupWriteAndAShardNobodyHoldsIsAnError) {
  checkpoint::Sharding half = Hybrid(2, 2);
  half.ranks = {0, 1, -1, -1};  // one shard group saves
  const checkpoint::SavePlan plan({half}, {{"w", kFloat, Shared({1000, 1000}), 0}});
  EXPECT_EQ(BytesOf(plan, plan.ChunksOf(0)), 2000000);
  EXPECT_EQ(BytesOf(plan, plan.ChunksOf(1)), 2000000);
  EXPECT_TRUE(plan.ChunksOf(2).empty());
  half.ranks = {0, -1, 1, -1};  // one replica group does
  try {
    checkpoint::SavePlan({half}, {{"w", kFloat, Shared({1000, 1000}), 0}});
    FAIL();
  } catch (const base::Error& error) {
    EXPECT_THAT(
        error.what(),
        testing::HasSubstr("w: no rank of the saving process group holds its shard at [500, 0]"));
  }
  EXPECT_NO_THROW(checkpoint::SavePlan({half}, {{"w", kFloat, Shared({1, 1000}), 0}}))
      << "the other shard is empty";
}

// The places that the coordinator computes are those that the writer gives the records.
TEST(SavePlanTest, FilesAreLaidOutAsTheWriterWritesThem) {
  for (const bool single : {true, false}) {
    const checkpoint::SavePlan plan(
        {Hybrid(2, 2)}, {{"large", kFloat, Shared({1500, 1000}), 0},
                         {"small", kFloat, Shared({10}), 0},
                         {"odd", format::FindRecordDtype("uint8"), Shared({1234567}), 0},
                         {"last", kFloat, Shared({2, 2}), 0}});
    const std::vector<std::byte> zeros(8 << 20);
    std::vector<checkpoint::SavePlan::Writer> writers(4);
    for (int i = 0; i < 4; ++i) writers[static_cast<size_t>(i)].owner = {1, 2, 3 + i, 4};
    writers[0].objects = {{"object", 777}};
    const auto [file, files] =
        plan.Encode({.writers = writers, .save_id = 99, .single_file = single});
    const format::Metadata metadata = format::DecodeMetadata(base::AsBytes(file), "file");
    std::map<std::string, int64_t> sizes(files.begin(), files.end());
    std::map<std::string, std::vector<checkpoint::PlannedRecord>> places;
    for (const auto& [index, info] : *metadata.storage_data) {
      places[info.relative_path].push_back({info.offset, info.length});
    }
    FaultFileSystem fs;
    fs.MakeDirectory("/d");
    for (int64_t rank = 0; rank < 4; ++rank) {
      std::vector<checkpoint::RecordSource> records;
      if (rank == 0) records.push_back({"object", nullptr, {}, std::span(zeros).first(777)});
      const auto pieces = plan.ChunksOf(rank);
      for (const checkpoint::PlannedChunk& chunk : pieces) {
        const auto& tensor = plan.tensors()[chunk.tensor];
        const auto bytes = static_cast<size_t>(format::TensorBytes(*tensor.dtype, chunk.sizes));
        records.push_back({tensor.fqn, tensor.dtype, chunk.sizes, std::span(zeros).first(bytes)});
      }
      const auto layout = plan.Layout(
          pieces, rank == 0 ? std::vector<int64_t>{777} : std::vector<int64_t>{}, single);
      EXPECT_EQ(layout.size(), single ? 1 : records.size());
      for (size_t number = 0; number < layout.size(); ++number) {
        const format::DataFileName name{
            rank, 99, {1, 2, 3 + rank, 4}, false, static_cast<int64_t>(number)};
        checkpoint::ShardFileWriter writer(fs, "/d", name, {.block = 64 << 10});
        const auto mine = single ? std::span(records) : std::span(records).subspan(number, 1);
        const auto written = writer.Write(mine);
        ASSERT_EQ(written.size(), layout[number].records.size());
        const auto& planned = places.at(name.ToString());
        ASSERT_EQ(planned.size(), written.size());
        for (size_t i = 0; i < written.size(); ++i) {
          EXPECT_EQ(written[i].offset, layout[number].records[i].offset);
          EXPECT_EQ(written[i].length, layout[number].records[i].length);
          EXPECT_EQ(written[i].offset, planned[i].offset);
          EXPECT_EQ(written[i].length, planned[i].length);
        }
        const int64_t size = writer.Finish().size;
        EXPECT_EQ(size, layout[number].size);
        EXPECT_EQ(size, sizes.at(name.ToString()));
      }
    }
    EXPECT_EQ(files.size(), single ? 4 : metadata.storage_data->size());
    for (const auto& [fqn, entry] : metadata.state_dict_metadata) {
      const auto* tensor = std::get_if<format::TensorMetadata>(&entry);
      EXPECT_TRUE(tensor == nullptr || !tensor->chunks.empty()) << fqn;
    }
  }
}

}  // namespace
}  // namespace hsdp_ckpt
