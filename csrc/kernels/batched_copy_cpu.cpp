#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <c10/util/Exception.h>
#include <c10/util/FunctionRef.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/batched_copy.h"
#include "kernels/cast_cpu.h"

namespace hsdp_ckpt::kernels {
namespace {

// Bytes that are worth a task of their own: some 50 us of copying against the few us that waking a thread costs.
constexpr int64_t kTaskBytes = 512 << 10;

// From here on a batch is taken to be larger than the caches: what is written would be gone from them before it is read.
constexpr int64_t kStreamBytes = 32 << 20;

/// Whether copying all `segments` moves that much; `item` is the bytes that one element moves.
bool Streams(std::span<const CopySegment> segments, int64_t item) {
  int64_t total = 0;
  for (const auto& segment : segments) total += segment.numel;
  return total * item >= kStreamBytes;
}

/// Calls `run(first task, last task)` for ranges that together are [0, tasks), on torch's own threads.
///
/// at::parallel_for is a template that is parallel only in a file compiled with OpenMP, which would bring a second OpenMP
/// beside the one in torch's wheel. TensorIterator's loop is compiled in torch: one element for each task, never touched.
void ForEachTask(int64_t tasks, c10::function_ref<void(int64_t, int64_t)> run) {
  const at::TensorBase tickets = at::detail::empty_cpu({tasks}, at::kByte);
  auto iterator = at::TensorIteratorConfig().add_output(tickets).check_all_same_dtype(false).resize_outputs(false).build();
  const auto* base = static_cast<const char*>(tickets.const_data_ptr());
  const auto loop = [&](char** data, const int64_t* strides, int64_t inner, int64_t outer) {
    for (int64_t i = 0; i < outer; ++i) {
      const int64_t first = data[0] + i * strides[1] - base;
      run(first, first + inner);
    }
  };
  iterator.for_each(at::TensorIterator::loop2d_t(loop), /*grain_size=*/1);
}

/// Calls `run(segment, first element, elements)` for pieces that together are all segments, on torch's threads if there is
/// enough to do. `item` is the bytes that one element moves.
template <typename Run>
void ForEachPiece(std::span<const CopySegment> segments, int64_t item, const Run& run) {
  int64_t total = 0;
  for (const auto& segment : segments) total += segment.numel;
  const int64_t task = std::max<int64_t>(1, kTaskBytes / item);
  const int64_t tasks = (total + task - 1) / task;
  if (tasks <= 1 || at::get_num_threads() == 1 || at::in_parallel_region()) {
    for (const auto& segment : segments) {
      if (segment.numel > 0) run(segment, 0, segment.numel);
    }
    return;
  }
  std::vector<int64_t> ends(segments.size());
  int64_t end = 0;
  for (size_t i = 0; i < segments.size(); ++i) ends[i] = end += segments[i].numel;
  const auto run_tasks = [&](int64_t first_task, int64_t last_task) {
    int64_t at = first_task * task;
    const int64_t stop = std::min(last_task * task, total);
    auto i = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), at) - ends.begin());
    for (; at < stop; at = std::min(ends[i], stop), ++i) {
      const int64_t begin = ends[i] - segments[i].numel;
      if (segments[i].numel > 0) run(segments[i], at - begin, std::min(ends[i], stop) - at);
    }
  };
  ForEachTask(tasks, run_tasks);
}

template <typename Src, typename Dst, bool kAccumulate>
void CastAll(std::span<const CopySegment> segments, double scale) {
  constexpr int64_t kItem = sizeof(Src) + sizeof(Dst);
  const bool stream = Streams(segments, kItem);
  ForEachPiece(segments, kItem, [scale, stream](const CopySegment& segment, int64_t first, int64_t n) {
    Dst* dst = static_cast<Dst*>(segment.dst) + first;
    if (segment.src != nullptr) {
      CastRun<Src, Dst, kAccumulate>(static_cast<const Src*>(segment.src) + first, dst, n, scale, stream);
    } else if (!kAccumulate) {
      std::memset(static_cast<void*>(dst), 0, static_cast<size_t>(n) * sizeof(Dst));
    }
  });
}

template <typename Fn>
void WithType(c10::ScalarType type, const Fn& fn) {
  switch (type) {
    case c10::kFloat:
      return fn(float{});
    case c10::kDouble:
      return fn(double{});
    case c10::kBFloat16:
      return fn(c10::BFloat16{});
    case c10::kHalf:
      return fn(c10::Half{});
    default:
      TORCH_INTERNAL_ASSERT(false, "BatchedCopy does not compute with ", type);
  }
}

}  // namespace

void CopyCpu(std::span<const CopySegment> segments, int64_t item) {
  const bool stream = Streams(segments, 2 * item);
  ForEachPiece(segments, 2 * item, [item, stream](const CopySegment& segment, int64_t first, int64_t n) {
    char* dst = static_cast<char*>(segment.dst) + first * item;
    if (segment.src != nullptr) {
      CopyRun(static_cast<const char*>(segment.src) + first * item, dst, n * item, stream);
    } else {
      std::memset(dst, 0, static_cast<size_t>(n * item));
    }
  });
}

void CastCpu(std::span<const CopySegment> segments, c10::ScalarType src, c10::ScalarType dst, double scale,
             bool accumulate) {
  WithType(src, [&](auto s) {
    WithType(dst, [&](auto d) {
      if (accumulate) {
        CastAll<decltype(s), decltype(d), true>(segments, scale);
      } else {
        CastAll<decltype(s), decltype(d), false>(segments, scale);
      }
    });
  });
}

}  // namespace hsdp_ckpt::kernels
