#pragma once

// How a batch of pieces is shared out among torch's threads.

#include <ATen/Parallel.h>
#include <c10/util/FunctionRef.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

namespace hsdp_ckpt::kernels {

// Bytes that are worth a task of their own: some 50 us of copying against the few us that waking a
// thread costs.
inline constexpr int64_t kTaskBytes = 512 << 10;

/// While one lives, batches of this thread are not shared out: a background thread would start a
/// team of its own and take the cores away from the computation that it works beside.
class OneThread {
 public:
  OneThread() : before_(wanted) { wanted = true; }
  ~OneThread() { wanted = before_; }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;
  static bool Wanted() { return wanted; }

 private:
  static inline thread_local bool wanted = false;
  const bool before_;
};

/// Calls `run(first task, last task)` for ranges that together are [0, tasks), on torch's own
/// threads.
void ForEachTask(int64_t tasks, c10::function_ref<void(int64_t, int64_t)> run);

/// Calls `run(segment, first element, elements)` for pieces that together are all segments, on
/// torch's threads if there is enough to do. `item` is the bytes that one element moves.
template <typename Segment, typename Run>
void ForEachPiece(std::span<const Segment> segments, int64_t item, const Run& run) {
  int64_t total = 0;
  for (const auto& segment : segments) total += segment.numel;
  const int64_t task = std::max<int64_t>(1, kTaskBytes / item);
  const int64_t tasks = (total + task - 1) / task;
  if (tasks <= 1 || OneThread::Wanted() || at::get_num_threads() == 1 || at::in_parallel_region()) {
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

}  // namespace hsdp_ckpt::kernels
