#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "hsdp/param_group.h"

namespace hsdp_ckpt::hsdp {

/// When a forward frees the full parameters of a unit.
enum class ReshardAfterForward {
  kUnlessBackwardIsNext,  ///< not those that backward needs first: the outermost, the last to run
  kAlways,
  kNever,
};

/// How far one unit is in the backward under way.
struct BackwardProgress {
  std::vector<bool> arrived;         ///< by trainable parameter: its gradient is there
  size_t arrivals = 0;               ///< how many of them
  int64_t arrived_numel = 0;         ///< their elements
  bool is_halfway = false;           ///< half of the elements have arrived, see ParamGroup
  bool is_late = false;              ///< backward has come to another unit before that
  bool complete = false;             ///< all of them have arrived
  int graph_task = -1;               ///< autograd's, which has come to the unit's outputs last
  uint64_t first_node = UINT64_MAX;  ///< of the forwards whose outputs those are, see Unit
  bool in_parts = false;             ///< gradients have arrived in other graph tasks than that one

  void Begin(size_t trainable) {
    arrived.assign(trainable, false);
    arrivals = 0;
    arrived_numel = 0;
    is_halfway = is_late = false;
    complete = false;
    graph_task = -1;
    first_node = UINT64_MAX;
    in_parts = false;
  }
  /// Notes the gradient of one parameter of `numel` elements. True when it was the last one of
  /// them; should more come (a reentrant checkpoint runs backward piece by piece), they count anew.
  bool GradArrived(size_t slot, int64_t numel) {
    if (arrived[slot]) return false;
    arrived[slot] = true;
    arrived_numel += numel;
    if (++arrivals < arrived.size()) return false;
    arrived.assign(arrived.size(), false);
    arrivals = 0;
    arrived_numel = 0;
    complete = true;
    return true;
  }
};

/// One unit as the Schedule of its root sees it: its parameters, what a user has set, and what
/// Python is told.
struct Unit {
  const std::string& name() const { return group->name(); }
  bool trains() const { return !group->trainable().empty(); }
  /// Whether its backward comes to where half of its gradients are there and others are not, before
  /// it comes to another unit.
  bool has_halfway() const { return group->half_of_grads() > 0 && !missed_halfway; }

  std::shared_ptr<ParamGroup> group;

  // What a user sets between steps.
  ReshardAfterForward reshard_after_forward = ReshardAfterForward::kUnlessBackwardIsNext;
  bool reshard_after_backward = true;
  size_t reductions_in_flight = 2;  ///< a model's is the largest of its units'
  bool unshard_in_backward = true;  ///< false: its gradients do not take its parameters' values
  /// A user's hooks run in its backward, and may read any full parameter there: all stay until
  /// backward has gone past the unit.
  bool is_watched = false;
  bool sync = true;  ///< false: gradients stay with the full parameters and are added to
  /// The units whose gathers start with this one's, instead of those that the last pass suggests.
  /// Empty: what the last pass suggests.
  std::vector<std::weak_ptr<Unit>> forward_prefetch, backward_prefetch;

  /// The unit is about to be used in backward: Python puts the full parameters into the module, for
  /// a recomputation.
  std::function<void()> on_backward;
  /// The reduced gradients are there: Python names the tensors they go to.
  std::function<void()> on_reduced;

  // What the Schedule notes here.
  bool idle_in_backward = false;  ///< in the pass under way: frozen, and before all that is trained
  bool frozen = false;  ///< some parameter is: it may be needed when all gradients are there
  bool unsharded_by_user = false;  ///< for a forward to come
  bool missed_halfway = false;     ///< in the last backward: gradients did not come, or too late
  bool outdated = false;  ///< kept for the graph of an earlier backward: forward gathers anew
  /// The nodes of autograd's graph that this pass's forwards have made have this sequence number or
  /// higher ones.
  uint64_t first_node = UINT64_MAX;
  BackwardProgress backward;
};

using UnitPtr = std::shared_ptr<Unit>;
using UnitSequence = std::vector<UnitPtr>;

/// Whether `units` has `unit`.
template <typename Units>
bool Contains(const Units& units, const UnitPtr& unit) {
  return std::find(units.begin(), units.end(), unit) != units.end();
}

}  // namespace hsdp_ckpt::hsdp
