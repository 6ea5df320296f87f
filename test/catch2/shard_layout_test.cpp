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

TEST_CASE("shards on any dimension are torch.chunk's, and lie where a place says", "[layout]") {
  const std::vector<int64_t> sizes =
      GENERATE(as<std::vector<int64_t>>{}, std::vector<int64_t>{8}, std::vector<int64_t>{4, 6},
               std::vector<int64_t>{2, 4, 3}, std::vector<int64_t>{3, 0, 8, 5});
  const int64_t dim = GENERATE(0, 1, 2, 3);
  const int64_t shards = GENERATE(1, 2, 4);
  if (dim >= static_cast<int64_t>(sizes.size())) return;
  if (dim > 0 && sizes[dim] % shards != 0) return;  // only the first one is cut unevenly
  const hsdp::CutSizes cut{sizes, dim};
  const hsdp::ShardLayout layout({hsdp::ParamShape::Of(cut, shards)}, shards, 1);
  at::Tensor whole = at::zeros(sizes, at::kLong);
  whole.view(-1).copy_(at::arange(whole.numel()));
  const auto chunks = whole.chunk(shards, dim);
  int64_t covered = 0;
  for (int64_t rank = 0; rank < shards; ++rank) {
    const hsdp::ShardPlace place = layout.place(0, rank);
    at::Tensor shard = at::empty({0}, at::kLong);
    for (int64_t run = 0; run < place.runs && place.run > 0; ++run)
      shard =
          at::cat({shard, whole.view(-1).narrow(0, place.first + run * place.stride, place.run)});
    const bool has_one = rank < static_cast<int64_t>(chunks.size());
    const at::Tensor expected = has_one ? chunks[rank].reshape({-1}) : at::empty({0}, at::kLong);
    CHECK(at::equal(shard, expected));
    CHECK(layout.shard_numel(0, rank) == expected.numel());
    CHECK(at::empty(cut.WithRows(layout.shard_rows(0, rank))).numel() == expected.numel());
    covered += shard.numel();
  }
  CHECK(covered == whole.numel());
}

TEST_CASE("a layout refuses cuts that torch refuses", "[layout]") {
  CHECK_THROWS_AS(hsdp::ParamShape::Of({{4, 6}, 2}, 2), std::invalid_argument);
  CHECK_THROWS_AS(hsdp::ParamShape::Of({{4, 6}, -1}, 2), std::invalid_argument);
  CHECK_THROWS_AS(hsdp::ParamShape::Of({{4, 6}, 1}, 4), std::invalid_argument);
  CHECK(hsdp::ParamShape::Of({{}, 0}, 4).numel() == 4);
}
