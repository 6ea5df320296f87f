#include "snapshot/staging_copy.h"

#include <algorithm>
#include <cstring>

#include "base/crc32.h"
#include "base/parallel.h"

namespace hsdp_ckpt::snapshot {

static_assert(StagingCopy::kChunk % base::kChecksumBlock == 0);

StagingCopy::StagingCopy(const std::vector<CopyPiece>& pieces) {
  int64_t in_chunk = 0;
  size_t sums = 0;
  for (size_t index = 0; index < pieces.size(); ++index) {
    const size_t first_sum = sums;
    for (int64_t from = 0; from < pieces[index].size;) {
      const CopyPiece& piece = pieces[index];
      const int64_t size = std::min(piece.size - from, kChunk);
      parts_.push_back({{piece.source + from, piece.target + from, size}, index, sums});
      sums += static_cast<size_t>((size + base::kChecksumBlock - 1) / base::kChecksumBlock);
      from += size;
      bytes_ += size;
      in_chunk += size;
      if (in_chunk >= kChunk) {
        chunks_.push_back(parts_.size());
        in_chunk = 0;
      }
    }
    if (sums > first_sum) sums_of_.push_back({pieces[index].target, first_sum, sums - first_sum});
  }
  if (in_chunk > 0) chunks_.push_back(parts_.size());
  left_ = chunks_.size();
  sums_.resize(sums);
  std::sort(sums_of_.begin(), sums_of_.end(),
            [](const Sums& a, const Sums& b) { return a.target < b.target; });
}

void StagingCopy::Run() {
  for (size_t chunk = next_++; chunk < chunks_.size(); chunk = next_++) {
    for (size_t i = chunk == 0 ? 0 : chunks_[chunk - 1]; i < chunks_[chunk]; ++i) {
      const CopyPiece& piece = parts_[i].piece;
      size_t sum = parts_[i].first_sum;
      for (int64_t at = 0; at < piece.size; at += base::kChecksumBlock) {
        const auto size = static_cast<size_t>(std::min(base::kChecksumBlock, piece.size - at));
        sums_[sum++] = base::CopyAndCrc32({piece.target + at, size}, {piece.source + at, size});
      }
    }
    if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      const std::lock_guard lock(
          mutex_);  // else the notice could fall between a waiter's look and its wait
      none_left_.notify_all();
    }
  }
}

void StagingCopy::Finish() {
  Run();
  std::unique_lock lock(mutex_);
  none_left_.wait(lock, [this] { return done(); });
}

std::span<const uint32_t> StagingCopy::Checksums(const std::byte* target) const {
  const auto found =
      std::lower_bound(sums_of_.begin(), sums_of_.end(), target,
                       [](const Sums& sums, const std::byte* at) { return sums.target < at; });
  if (found == sums_of_.end() || found->target != target) return {};
  return std::span(sums_).subspan(found->first, found->count);
}

void StagingCopy::Cancel() {
  // What has been handed out already is counted down by whoever has it.
  const size_t taken = std::min(next_.exchange(chunks_.size()), chunks_.size());
  const size_t given_up = chunks_.size() - taken;
  if (given_up > 0 && left_.fetch_sub(given_up, std::memory_order_acq_rel) == given_up) {
    const std::lock_guard lock(mutex_);
    none_left_.notify_all();
  }
}

int64_t StagingCopy::FirstChange(int threads) const {
  std::atomic<size_t> first{SIZE_MAX};
  base::ParallelFor(chunks_.size(), threads, [&](size_t chunk) {
    for (size_t i = chunk == 0 ? 0 : chunks_[chunk - 1]; i < chunks_[chunk]; ++i) {
      const CopyPiece& piece = parts_[i].piece;
      if (std::memcmp(piece.target, piece.source, static_cast<size_t>(piece.size)) == 0) continue;
      size_t known = first;
      while (parts_[i].index < known && !first.compare_exchange_weak(known, parts_[i].index)) {
      }
    }
  });
  return first == SIZE_MAX ? -1 : static_cast<int64_t>(first.load());
}

}  // namespace hsdp_ckpt::snapshot
