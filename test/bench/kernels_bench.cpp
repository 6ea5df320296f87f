// BatchedCopy beside the operators that torch's FSDP2 packs and unpacks with, and beside a plain
// copy of the same bytes: Catch2 benchmarks on one thread, for test/bench/run.py, which makes a
// table of their XML. No tests: CTest does not run them.
#define CATCH_CONFIG_RUNNER
#define CATCH_CONFIG_ENABLE_BENCHMARKING

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "../catch2/catch2.h"
#include "kernels/batched_copy.h"
#ifdef HSDP_CKPT_WITH_CUDA
#include <c10/cuda/CUDAFunctions.h>
#endif

namespace {

using hsdp_ckpt::kernels::BatchedCopy;
using hsdp_ckpt::kernels::CopySegment;

constexpr int64_t kShards = 4;

struct Case {
  std::string name;
  int64_t bytes;  // read and written, once each; the copy reads half of them and writes half
  std::function<void()> ours, torch, copy;
  std::vector<at::Tensor> memory;  // what the segments point into
};

void Synchronize(at::Device device) {
#ifdef HSDP_CKPT_WITH_CUDA
  if (device.is_cuda()) c10::cuda::device_synchronize();
#endif
  (void)device;
}

/// The parameters of a transformer block of width `d`; `uneven` ones don't divide by the shards.
std::vector<at::Tensor> Block(int64_t d, bool uneven, at::TensorOptions options) {
  const int64_t odd = uneven ? 1 : 0;
  std::vector<at::Tensor> params;
  for (const auto& shape : std::vector<std::vector<int64_t>>{{3 * d + odd, d},
                                                             {3 * d},
                                                             {d + odd, d},
                                                             {d},
                                                             {4 * d + odd, d},
                                                             {4 * d + odd},
                                                             {d, 4 * d},
                                                             {d},
                                                             {d},
                                                             {d},
                                                             {d},
                                                             {d}}) {
    params.push_back(at::rand(shape, options.dtype(at::kFloat)).to(options.dtype().toScalarType()));
  }
  return params;
}

/// The segments between full parameters and `kShards` buffers of all parameters' chunks, zeros
/// where a chunk runs short.
std::vector<CopySegment> Segments(const std::vector<at::Tensor>& params, const at::Tensor& packed,
                                  bool pack) {
  std::vector<CopySegment> segments;
  auto* base = static_cast<char*>(packed.data_ptr());
  const int64_t item = packed.element_size();
  int64_t offset = 0;
  for (int64_t shard = 0; shard < kShards; ++shard) {
    for (const auto& param : params) {
      const int64_t row = param.numel() / param.size(0),
                    rows = (param.size(0) + kShards - 1) / kShards;
      const int64_t first = std::min(shard * rows, param.size(0)),
                    last = std::min(first + rows, param.size(0));
      char* whole = static_cast<char*>(param.data_ptr()) + first * row * param.element_size();
      char* part = base + offset * item;
      const int64_t n = (last - first) * row, padding = rows * row - n;
      if (pack) {
        segments.push_back({whole, part, n});
        if (padding > 0) segments.push_back({nullptr, part + n * item, padding});
      } else {
        segments.push_back({part, whole, n});
      }
      offset += rows * row;
    }
  }
  return segments;
}

std::vector<Case> Cases(at::Device device, int64_t d) {
  std::vector<Case> cases;
  const auto copy_of = [device](int64_t bytes) -> std::function<void()> {
    const auto from = at::ones({bytes}, at::TensorOptions().device(device).dtype(at::kByte)),
               to = at::zeros_like(from);
    if (device.is_cuda()) return [=] { to.copy_(from); };
    return [=] { std::memcpy(to.data_ptr(), from.data_ptr(), from.nbytes()); };
  };
  const auto pack = [&](const char* name, at::ScalarType from, at::ScalarType to, bool uneven) {
    const auto params = Block(d, uneven, at::TensorOptions().device(device).dtype(from));
    const auto shape = at::_chunk_cat(params, 0, kShards).sizes().vec();
    const auto ours = at::empty(shape, params[0].options().dtype(to));
    const auto segments = Segments(params, ours, /*pack=*/true);
    const int64_t bytes = ours.numel() * (ours.element_size() + params[0].element_size());
    auto theirs = at::empty_like(ours);
    cases.push_back({name,
                     bytes,
                     [=] { BatchedCopy(device, segments, from, to); },
                     [=]() mutable { at::_chunk_cat_out(theirs, params, 0, kShards); },
                     copy_of(bytes / 2),
                     {ours}});
  };
  pack("pack fp32", at::kFloat, at::kFloat, false);
  pack("pack fp32, uneven", at::kFloat, at::kFloat, true);
  pack("pack bf16 to fp32", at::kBFloat16, at::kFloat, false);
  {
    const auto params = Block(d, false, at::TensorOptions().device(device).dtype(at::kFloat));
    const auto packed = at::_chunk_cat(params, 0, kShards);
    std::vector<int64_t> sizes;
    std::vector<at::Tensor> outs;
    for (const auto& param : params) {
      sizes.push_back(param.numel() / kShards);
      outs.push_back(at::empty_like(param).view({kShards, -1}));
    }
    const auto segments = Segments(params, packed, /*pack=*/false);
    const int64_t bytes = 2 * static_cast<int64_t>(packed.nbytes());
    cases.push_back({"unpack fp32", bytes,
                     [=] { BatchedCopy(device, segments, at::kFloat, at::kFloat); },
                     [=]() mutable { at::split_with_sizes_copy_out(outs, packed, sizes, 1); },
                     copy_of(bytes / 2), params});
  }
  const auto cast = [&](const char* name, at::ScalarType from, at::ScalarType to, bool accumulate) {
    const auto src = at::rand({12 * d * d}, at::TensorOptions().device(device)).to(from);
    const auto ours = at::zeros({12 * d * d}, src.options().dtype(to)),
               theirs = at::zeros_like(ours);
    const CopySegment segment{src.data_ptr(), ours.data_ptr(), src.numel()};
    const int64_t bytes = static_cast<int64_t>(src.nbytes() + ours.nbytes() * (accumulate ? 2 : 1));
    cases.push_back({name,
                     bytes,
                     [=] { BatchedCopy(device, {&segment, 1}, from, to, 1.0, accumulate); },
                     [=] { accumulate ? theirs.add_(src) : theirs.copy_(src); },
                     copy_of(bytes / 2),
                     {ours}});
  };
  cast("cast fp32 to bf16", at::kFloat, at::kBFloat16, false);
  cast("cast bf16 to fp32", at::kBFloat16, at::kFloat, false);
  cast("cast fp32 to fp16", at::kFloat, at::kHalf, false);
  cast("accumulate bf16 in fp32", at::kBFloat16, at::kFloat, true);
  return cases;
}

/// Several rounds of all three, so that what else the machine does meets each of them. The names
/// are fields for run.py: device, width, what, bytes, calls that are timed as one, whose.
void Run(at::Device device, int64_t d) {
  constexpr int kRounds = 7;
  const int calls = device.is_cuda() ? 20 : 1;
  for (const auto& item : Cases(device, d)) {
    const std::string fields = device.str() + "|" + std::to_string(d) + "|" + item.name + "|" +
                               std::to_string(item.bytes) + "|" + std::to_string(calls) + "|";
    for (int round = 0; round < kRounds; ++round) {
      for (const auto& side :
           {std::pair("ours", &item.ours), {"torch", &item.torch}, {"copy", &item.copy}}) {
        BENCHMARK(fields + side.first) {
          for (int i = 0; i < calls; ++i) (*side.second)();
          Synchronize(device);
        };
      }
    }
  }
}

}  // namespace

TEST_CASE("on the CPU, within the caches and beyond them", "[benchmark][cpu]") {
  for (const int64_t d : {256, 1024}) Run(at::kCPU, d);
}

TEST_CASE("on a GPU", "[benchmark][cuda]") {
  if (!at::globalContext().hasCUDA()) return;
  for (const int64_t d : {1024, 4096}) Run(at::Device(at::kCUDA, 0), d);
}

int main(int argc, char** argv) {
  at::set_num_threads(1);
  const c10::InferenceMode inference;
  return Catch::Session().run(argc, argv);
}
