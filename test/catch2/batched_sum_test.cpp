#include "batched_copy_cases.h"

using batched_copy_cases::EdgeSizes;
using batched_copy_cases::Hostile;
using batched_copy_cases::kComputed;
using batched_copy_cases::Shuffled;
using hsdp_ckpt::kernels::BatchedSum;
using hsdp_ckpt::kernels::SumSegment;

namespace {

/// Sums of `sources` random buffers, checked against ATen's to the last bit over the whole output,
/// gaps included. With `in_place` the output is one of the sources.
void CheckSum(at::ScalarType src_type, at::ScalarType dst_type, size_t sources, double scale,
              bool accumulate, bool in_place, unsigned seed) {
  std::mt19937 random(seed);
  const std::vector<int64_t> sizes = EdgeSizes();
  const auto [offsets, numel] = Shuffled(sizes, random);
  std::vector<at::Tensor> srcs;
  for (size_t i = 0; i < sources; ++i) srcs.push_back(Hostile(numel, src_type, random));
  const auto out = in_place ? srcs.back() : Hostile(numel, dst_type, random);
  const auto compute =
      src_type == at::kDouble || dst_type == at::kDouble ? at::kDouble : at::kFloat;
  auto expected = out.clone();
  std::vector<SumSegment> segments;
  for (size_t i = 0; i < sizes.size(); ++i) {
    SumSegment segment{
        {}, static_cast<char*>(out.data_ptr()) + offsets[i] * out.element_size(), sizes[i]};
    auto target = expected.slice(0, offsets[i], offsets[i] + sizes[i]);
    if (i % 7 == 5) {  // no sources: zeros
      if (!accumulate) target.zero_();
    } else {
      at::Tensor sum;
      for (const auto& src : srcs) {
        const auto piece = src.slice(0, offsets[i], offsets[i] + sizes[i]).to(compute);
        sum = sum.defined() ? sum + piece : piece;
        segment.srcs.push_back(static_cast<const char*>(src.const_data_ptr()) +
                               offsets[i] * src.element_size());
      }
      sum = sum * scale;
      target.copy_((accumulate ? sum + target.to(compute) : sum).to(dst_type));
    }
    segments.push_back(std::move(segment));
  }
  BatchedSum(segments, src_type, dst_type, scale, accumulate);
  const auto same = out.eq(expected).logical_or(out.isnan().logical_and(expected.isnan()));
  INFO(src_type << " to " << dst_type << ", " << sources << " sources, scale " << scale << ", seed "
                << seed);
  CHECK(same.all().item<bool>());
}

}  // namespace

TEST_CASE("sums are ATen's, in the order of the sources, to the last bit", "[kernels]") {
  const auto src = GENERATE(from_range(kComputed));
  const auto dst = GENERATE(from_range(kComputed));
  const size_t sources = GENERATE(1, 2, 5);
  const auto scale = GENERATE(1.0, 1.0 / 3.0);
  const bool accumulate = GENERATE(false, true);
  CheckSum(src, dst, sources, scale, accumulate, false, GENERATE(take(1, random(0u, ~0u))));
}

TEST_CASE("a sum may replace one of its sources", "[kernels]") {
  const auto type = GENERATE(from_range(kComputed));
  CheckSum(type, type, GENERATE(size_t{2}, size_t{3}), 0.5, false, true,
           GENERATE(take(2, random(0u, ~0u))));
}

TEST_CASE("what BatchedSum cannot do it refuses", "[kernels]") {
  std::array<int64_t, 4> src{}, dst{};
  const std::vector<SumSegment> good{{{src.data()}, dst.data(), 2}},
      negative{{{src.data()}, dst.data(), -1}};
  const std::vector<SumSegment> nowhere{{{src.data()}, nullptr, 1}},
      nothing{{{nullptr}, dst.data(), 1}};
  CHECK_THROWS_AS(BatchedSum(good, at::kLong, at::kLong), c10::TypeError);
  CHECK_THROWS_AS(BatchedSum(negative, at::kFloat, at::kFloat), c10::ValueError);
  CHECK_THROWS_AS(BatchedSum(nowhere, at::kFloat, at::kFloat), c10::ValueError);
  CHECK_THROWS_AS(BatchedSum(nothing, at::kFloat, at::kFloat), c10::ValueError);
}
