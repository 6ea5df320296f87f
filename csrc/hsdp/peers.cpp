#include "hsdp/peers.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <tuple>

namespace hsdp_ckpt::hsdp {

std::vector<std::vector<int64_t>> Peers::Exchange(const std::vector<int64_t>& words) const {
  using GroupPtr = c10::intrusive_ptr<c10d::ProcessGroup>;
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("c10d::_allgather_base_", "")
                             .typed<std::tuple<at::Tensor, WorkPtr>(
                                 at::Tensor&, at::Tensor&, const GroupPtr&, bool, int64_t)>();
  const auto count = static_cast<int64_t>(words.size());
  const auto ranks = static_cast<int64_t>(ranks_.size());
  at::Tensor input = at::empty({count}, at::kLong);
  at::Tensor output = at::empty({ranks * count}, at::kLong);
  std::copy(words.begin(), words.end(), input.mutable_data_ptr<int64_t>());
  const WorkPtr work =
      std::get<1>(op.call(output, input, c10d::resolve_process_group(group_), true, -1));
  if (work) work->wait();
  std::vector<std::vector<int64_t>> all;
  const int64_t* from = output.const_data_ptr<int64_t>();
  for (int64_t rank = 0; rank < ranks; ++rank)
    all.emplace_back(from + rank * count, from + (rank + 1) * count);
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
