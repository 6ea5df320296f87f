#pragma once

// Random batches of copies that BatchedCopy runs on any device and that ATen's own operators check
// on the CPU.

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "catch2.h"
#include "kernels/batched_copy.h"

namespace batched_copy_cases {

inline constexpr std::array kComputed{at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};

inline at::ScalarType BitsOf(at::ScalarType type) {
  constexpr std::array by_size{at::kByte, at::kByte, at::kShort, at::kInt, at::kInt, at::kLong};
  return by_size.at(std::min<size_t>(5, c10::elementSize(type) == 8 ? 5 : c10::elementSize(type)));
}

/// Elements of random bits, every fourth one a value where casts go wrong: ties, overflow,
/// denormals, infinities, NaN.
inline at::Tensor Hostile(int64_t n, at::ScalarType type, std::mt19937& random) {
  static const std::vector<double> kHard{0.0,
                                         -0.0,
                                         1.0,
                                         -1.0,
                                         INFINITY,
                                         -INFINITY,
                                         NAN,
                                         65504.0,
                                         65519.0,
                                         65520.0,
                                         65536.,
                                         1e-40,
                                         -1e-45,
                                         3.4e38,
                                         0x1p-24,
                                         0x1p-25,
                                         0x1.8p-25,
                                         0x1.01p0,
                                         0x1.03p0,
                                         0x1.02p0,
                                         1e300,
                                         1e-310,
                                         2049.0,
                                         2051.0,
                                         0x1.fffffep127,
                                         0x1.fefffep127,
                                         0x1.ff0000p127,
                                         0x1.00000100001p0,
                                         0x1p-126,
                                         0x1p-133};
  std::vector<uint32_t> words((static_cast<size_t>(n) * c10::elementSize(type) + 3) / 4);
  std::generate(words.begin(), words.end(), std::ref(random));
  auto out = at::empty({n}, type);
  std::memcpy(out.data_ptr(), words.data(), static_cast<size_t>(n) * c10::elementSize(type));
  // Others do not outlive torch's own copies on the CPU.
  if (type == at::kBool) out.view(at::kByte).bitwise_and_(1);
  if (std::find(kComputed.begin(), kComputed.end(), type) != kComputed.end()) {
    const auto hard = at::tensor(kHard, at::kDouble).to(type);
    const int64_t start = std::uniform_int_distribution<int64_t>(0, 3)(random);
    if (start < n) {
      auto some = out.slice(0, start, n, 4);
      some.copy_(hard.repeat({some.size(0) / hard.size(0) + 1}).slice(0, 0, some.size(0)));
    }
  }
  return out;
}

/// Places pieces of `sizes` elements in random order with random gaps; returns each piece's offset
/// and the whole length. With gaps of up to 19 elements the pieces start at every alignment.
inline std::pair<std::vector<int64_t>, int64_t> Shuffled(const std::vector<int64_t>& sizes,
                                                         std::mt19937& random) {
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::shuffle(order.begin(), order.end(), random);
  std::uniform_int_distribution<int64_t> gap(1, 19);
  std::vector<int64_t> offsets(sizes.size());
  int64_t end = gap(random);
  for (const size_t i : order) {
    offsets[i] = end;
    end += sizes[i] + gap(random);
  }
  return {offsets, end};
}

/// One batch, checked to the last bit over the whole output buffer, gaps included. NaNs need only
/// be NaNs where computed.
inline void Check(at::Device device, at::ScalarType src_type, at::ScalarType dst_type,
                  const std::vector<int64_t>& sizes, double scale, bool accumulate, unsigned seed) {
  std::mt19937 random(seed);
  const auto [src_offsets, src_numel] = Shuffled(sizes, random);
  const auto [dst_offsets, dst_numel] = Shuffled(sizes, random);
  const auto src = Hostile(src_numel, src_type, random);
  const auto before = Hostile(dst_numel, dst_type, random);
  const auto on_device_src = src.to(device);
  const auto out = before.to(device, dst_type, /*non_blocking=*/false, /*copy=*/true);

  const bool computes = src_type != dst_type || scale != 1.0 || accumulate;
  const auto compute =
      src_type == at::kDouble || dst_type == at::kDouble ? at::kDouble : at::kFloat;
  auto expected = before.clone();
  auto computed = at::zeros({dst_numel}, at::kBool);
  std::vector<hsdp_ckpt::kernels::CopySegment> segments;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const bool zeros = i % 7 == 5;
    const auto piece = src.slice(0, src_offsets[i], src_offsets[i] + sizes[i]);
    auto target = expected.slice(0, dst_offsets[i], dst_offsets[i] + sizes[i]);
    if (zeros) {
      if (!accumulate) std::fill_n(static_cast<char*>(target.data_ptr()), target.nbytes(), 0);
    } else if (!computes) {
      std::copy_n(static_cast<const char*>(piece.const_data_ptr()), piece.nbytes(),
                  static_cast<char*>(target.data_ptr()));
    } else {
      auto value = scale == 1.0 ? piece.to(compute) : piece.to(compute) * scale;
      if (accumulate) value = value + target.to(compute);
      target.copy_(value.to(dst_type));
      computed.slice(0, dst_offsets[i], dst_offsets[i] + sizes[i]).fill_(true);
    }
    const auto* from = static_cast<const char*>(on_device_src.const_data_ptr()) +
                       src_offsets[i] * src.element_size();
    auto* to = static_cast<char*>(out.data_ptr()) + dst_offsets[i] * out.element_size();
    segments.push_back({zeros ? nullptr : from, to, sizes[i]});
  }
  hsdp_ckpt::kernels::BatchedCopy(device, segments, src_type, dst_type, scale, accumulate);

  const auto result = out.to(at::kCPU);
  if (!computes) {
    CHECK(std::memcmp(result.const_data_ptr(), expected.const_data_ptr(), result.nbytes()) == 0);
    return;
  }
  const auto bits = BitsOf(dst_type);
  const auto differ = result.view(bits).ne(expected.view(bits));
  const auto wrong = differ.logical_and(
      computed.logical_and(result.isnan()).logical_and(expected.isnan()).logical_not());
  const auto where = wrong.nonzero();
  INFO(src_type << " to " << dst_type << ", scale " << scale << ", accumulate " << accumulate
                << ", seed " << seed);
  if (where.numel() > 0) {
    const auto at = where[0].item<int64_t>();
    FAIL_CHECK(where.numel() << " elements differ, the first at " << at << ": got "
                             << result[at].item<double>() << ", expected "
                             << expected[at].item<double>() << ", was "
                             << before[at].item<double>());
  }
  CHECK(where.numel() == 0);
}

inline std::vector<int64_t> EdgeSizes() {
  return {0,  1,  2,  3,  4,   5,   7,   8,    9,    15,   16,   17, 31,
          32, 33, 63, 65, 255, 256, 257, 1000, 4095, 4096, 4097, 0,  1};
}

}  // namespace batched_copy_cases
