#include "base/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace hsdp_ckpt::base {

void ParallelFor(size_t count, int threads, const std::function<void(size_t)>& fn) {
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  std::mutex mutex;
  const auto work = [&] {
    for (size_t i = next++; i < count && !failed; i = next++) {
      try {
        fn(i);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
        failed = true;
      }
    }
  };
  std::vector<std::thread>
      workers;  // nothing may throw between the first thread's start and the joins
  const size_t extra =
      std::min<size_t>(count, static_cast<size_t>(std::max(threads, 1))) - (count > 0 ? 1 : 0);
  workers.reserve(extra);
  try {
    for (size_t i = 0; i < extra; ++i) workers.emplace_back(work);
  } catch (const std::exception&) {
    // system_error or bad_alloc. No more threads to be had: the ones there are, or the caller
    // alone, do the work.
  }
  work();
  for (auto& worker : workers) worker.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace hsdp_ckpt::base
