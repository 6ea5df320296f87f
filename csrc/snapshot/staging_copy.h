#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

namespace hsdp_ckpt::snapshot {

/// A record's payload, and where in the staging image it goes.
struct CopyPiece {
  const std::byte* source;
  std::byte* target;
  int64_t size;  ///< bytes
};

/// A snapshot's copying, done by whichever threads come: one in the background while training goes
/// on, and the training thread itself once it must not go on before everything is copied. It sums
/// what it copies: while a piece is in the cache that costs a twentieth of copying it, later on
/// half.
///
/// It owns no thread and no memory, so a forked child may drop it. Sources and targets have to live
/// until done() or, after Cancel(), until Finish() has returned; they may be read meanwhile, but
/// not written. All methods are thread-safe.
class StagingCopy {
 public:
  /// Bytes that a thread takes on at a time: small enough for two threads to end together.
  static constexpr int64_t kChunk = int64_t{1} << 20;

  /// Targets must not overlap each other or any source.
  explicit StagingCopy(const std::vector<CopyPiece>& pieces);

  /// Copies until there is nothing left to take on. Others may still be at theirs when it returns.
  void Run();
  /// Run(), and waits for what others have taken on.
  void Finish();
  /// Nothing more is taken on: a save that is given up lets the training go on.
  void Cancel();
  bool done() const { return left_.load(std::memory_order_acquire) == 0; }
  int64_t bytes() const { return bytes_; }
  /// After done(), without a Cancel(): the CRC-32 of each base::kChecksumBlock of the payload that
  /// was copied to `target`, the last one shorter. Empty if none was.
  std::span<const uint32_t> Checksums(const std::byte* target) const;
  /// The first piece whose source no longer is what was copied, or -1. After done(); reads
  /// everything, in `threads` threads.
  int64_t FirstChange(int threads) const;

 private:
  struct Part {
    CopyPiece piece;
    size_t index;      // of the piece it is cut from
    size_t first_sum;  // where in sums_ its checksums begin
  };

  struct Sums {
    const std::byte* target;
    size_t first, count;  // in sums_
  };

  std::vector<Part> parts_;     // pieces, the large ones cut
  std::vector<size_t> chunks_;  // where in parts_ each chunk ends
  std::vector<uint32_t> sums_;
  std::vector<Sums> sums_of_;  // by target
  int64_t bytes_ = 0;
  std::atomic<size_t> next_{0};
  std::atomic<size_t> left_{0};  // chunks that are not copied and not given up
  std::mutex mutex_;
  std::condition_variable none_left_;
};

}  // namespace hsdp_ckpt::snapshot
