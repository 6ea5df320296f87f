#include "hsdp/peers.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include "hsdp/pending_works.h"

namespace hsdp_ckpt::hsdp {

// Messages, through the first rank: unlike a collective's they can be given up when a rank leaves.
std::vector<std::vector<int64_t>> Peers::Exchange(const std::vector<int64_t>& words) const {
  const GroupPtr group = c10d::resolve_process_group(group_);
  const auto count = static_cast<int64_t>(words.size());
  const auto ranks = static_cast<int64_t>(ranks_.size());
  const int64_t here = group->getRank();
  const JointOp op = departures_->Begin(Joint::kQuestion);
  at::Tensor everyones = at::empty({ranks, count}, at::kLong);
  std::copy(words.begin(), words.end(), everyones[here].mutable_data_ptr<int64_t>());
  PendingWorks works(departures_, op);
  if (here == 0) {
    for (int64_t rank = 1; rank < ranks; ++rank) works.Receive(everyones[rank], group, rank);
    works.Wait();
    works = PendingWorks(departures_, op);
    for (int64_t rank = 1; rank < ranks; ++rank) works.Send(everyones, group, rank);
  } else {
    // What comes back covers what was sent, which may still be on its way.
    works.Send(everyones[here].clone(), group, /*peer=*/0);
    works.Receive(everyones, group, /*peer=*/0);
  }
  works.Wait();
  std::vector<std::vector<int64_t>> all;
  const int64_t* from = everyones.const_data_ptr<int64_t>();
  for (int64_t rank = 0; rank < ranks; ++rank) {
    all.emplace_back(from + rank * count, from + (rank + 1) * count);
  }
  return all;
}

std::string Peers::Differing(
    const std::vector<std::vector<int64_t>>& all,
    const std::function<std::string(const std::vector<int64_t>&)>& shown) const {
  if (std::all_of(all.begin(), all.end(), [&](const auto& words) { return words == all[0]; }))
    return {};
  std::string lines;
  for (size_t i = 0; i < all.size(); ++i)
    lines += "\n\trank " + std::to_string(ranks_[i]) + ": " + shown(all[i]);
  return lines;
}

}  // namespace hsdp_ckpt::hsdp
