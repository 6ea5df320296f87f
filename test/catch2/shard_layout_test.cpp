#include "hsdp/shard_layout.h"

#include <ATen/ATen.h>

#include "catch2.h"

namespace hsdp = hsdp_ckpt::hsdp;

TEST_CASE("chunks are torch.chunk's", "[layout]") {
  const int64_t rows = GENERATE(0, 1, 2, 3, 7, 8, 9, 64, 65);
  const int64_t shards = GENERATE(1, 2, 3, 4, 8, 16);
  const hsdp::ShardLayout layout({{rows, 3}}, shards, 4);
  const auto chunks = at::empty({rows, 3}).chunk(shards);
  int64_t first = 0;
  for (int64_t rank = 0; rank < shards; ++rank) {
    // torch.chunk of no rows still returns empty chunks, and returns fewer chunks where rows run
    // out.
    const int64_t expected = rank < static_cast<int64_t>(chunks.size()) ? chunks[rank].size(0) : 0;
    CHECK(layout.shard_rows(0, rank) == expected);
    CHECK(layout.first_row(0, rank) == first);
    CHECK(layout.shard_numel(0, rank) == 3 * expected);
    first += expected;
  }
  CHECK(first == rows);
}

TEST_CASE("slices are aligned, disjoint and the same on every rank", "[layout]") {
  const int64_t shards = GENERATE(1, 2, 4, 5);
  const int64_t alignment = GENERATE(1, 4, 8);
  const std::vector<hsdp::ParamShape> params{{7, 5}, {1, 1}, {0, 9}, {16, 4}, {3, 1}};
  const hsdp::ShardLayout layout(params, shards, alignment);
  int64_t end = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    CHECK(layout.offset(i) % alignment == 0);
    CHECK(layout.offset(i) >= end);
    end = layout.offset(i) + layout.chunk_rows(i) * params[i].row_size;
  }
  CHECK(layout.flat_numel() >= end);
  CHECK(layout.flat_numel() < end + alignment);
}

TEST_CASE("an order says how slices follow each other, not what they are called", "[layout]") {
  const std::vector<hsdp::ParamShape> params{{7, 5}, {4, 1}, {16, 4}};
  const hsdp::ShardLayout layout(params, 2, 4, {2, 0, 1});
  CHECK(layout.offset(2) == 0);
  CHECK(layout.offset(0) == 32);
  CHECK(layout.offset(1) == 52);
  CHECK(layout.flat_numel() == 56);
  CHECK(layout.shard_rows(0, 1) == 3);
}

TEST_CASE("a layout refuses nonsense", "[layout]") {
  CHECK_THROWS_AS(hsdp::ShardLayout({{1, 1}}, 0, 1), std::invalid_argument);
  CHECK_THROWS_AS(hsdp::ShardLayout({{-1, 1}}, 1, 1), std::invalid_argument);
  CHECK_THROWS_AS(hsdp::ShardLayout({{1, 1}}, 1, 0), std::invalid_argument);
}
