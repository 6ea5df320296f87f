#pragma once

// Units whose collectives reach no other rank: they are noted, and are over when the test says so.

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>
#include <vector>

#include "hsdp/unit.h"

namespace fake_units {

namespace hsdp = hsdp_ckpt::hsdp;

/// What has happened, in order: "gather a", "wait for gather a", "reduced a".
using Log = std::vector<std::string>;

constexpr int64_t kThisRank = 7;  // in the default group

/// One operation. It is over when the test says so, or when somebody waits for it.
class FakeWork : public c10d::Work {
 public:
  FakeWork(std::string name, Log& log) : name_(std::move(name)), log_(log) {}

  /// The operation is over once it has been asked so many times whether it is.
  void FinishAfter(int64_t questions) { questions_left_ = questions; }
  void Finish() { FinishAfter(0); }
  /// From now on waiting for the operation throws.
  void Fail() { fails_ = true; }

  bool isCompleted() override { return fails_ || (questions_left_ && (*questions_left_)-- <= 0); }
  bool wait(std::chrono::milliseconds) override {
    TORCH_CHECK_WITH(DistBackendError, !fails_, "the wire is cut");
    if (!isCompleted()) log_.push_back("wait for " + name_);
    Finish();
    return true;
  }

 private:
  const std::string name_;
  Log& log_;
  bool fails_ = false;
  std::optional<int64_t> questions_left_;
};

/// What a FakeBackend is like.
struct Abilities {
  std::string name = "fake";
  bool coalesces = false;
  bool averages = true;
};

/// The first one of two ranks, whose peer does nothing. It returns a work for every operation,
/// whether it was called for one or not.
class FakeBackend : public c10d::Backend {
 public:
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;

  FakeBackend(std::string unit, Log& log, Abilities abilities)
      : Backend(/*rank=*/0, /*size=*/2),
        unit_(std::move(unit)),
        log_(log),
        abilities_(std::move(abilities)) {}

  const std::string getBackendName() const override { return abilities_.name; }
  bool supportsCoalescing() const override { return abilities_.coalesces; }
  WorkPtr _allgather_base(at::Tensor&, at::Tensor&, const c10d::AllgatherOptions&) override {
    return Issue("gather");
  }
  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor&,
                               const c10d::ReduceScatterOptions& options) override {
    CheckOp(options.reduceOp);
    if (output.is_cpu()) output.zero_();
    return Issue("reduce-scatter");
  }
  WorkPtr allreduce(std::vector<at::Tensor>&, const c10d::AllreduceOptions& options) override {
    CheckOp(options.reduceOp);
    return Issue("all-reduce");
  }
  WorkPtr broadcast(std::vector<at::Tensor>&, const c10d::BroadcastOptions&) override {
    return Issue("broadcast");
  }

  /// The operation that was issued last.
  FakeWork& last() const { return *last_; }

 private:
  WorkPtr Issue(const std::string& operation) {
    const std::string name = operation + " " + unit_;
    log_.push_back(name);
    last_ = c10::make_intrusive<FakeWork>(name, log_);
    return last_;
  }

  void CheckOp(const c10d::ReduceOp& op) const {
    TORCH_CHECK_NOT_IMPLEMENTED(abilities_.averages || op != c10d::ReduceOp::AVG, "no AVG here");
  }

  const std::string unit_;
  Log& log_;
  const Abilities abilities_;
  c10::intrusive_ptr<FakeWork> last_;
};

/// A process group that is registered as long as this lives, with one backend for CPU and CUDA.
class FakeGroup {
 public:
  FakeGroup(std::string name, const std::string& unit, Log& log, const Abilities& abilities = {})
      : name_(std::move(name)), backend_(c10::make_intrusive<FakeBackend>(unit, log, abilities)) {
    group_ = c10::make_intrusive<c10d::ProcessGroup>(/*rank=*/0, /*size=*/2);
    for (const auto device : {at::kCPU, at::kCUDA}) {
      group_->setBackend(device, c10d::ProcessGroup::BackendType::CUSTOM, backend_);
    }
    c10d::register_process_group(name_, group_);
  }
  ~FakeGroup() { c10d::unregister_process_group(name_); }
  FakeGroup(const FakeGroup&) = delete;
  FakeGroup& operator=(const FakeGroup&) = delete;

  const std::string& name() const { return name_; }
  FakeBackend& backend() const { return *backend_; }

 private:
  const std::string name_;
  const c10::intrusive_ptr<FakeBackend> backend_;
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
};

/// A unit of one trained parameter on two shards, times two replicas if it `replicates`. When its
/// gradients are reduced it notes that and drops them.
class FakeUnit {
 public:
  FakeUnit(const std::string& name, Log& log, bool replicates = false)
      : shards_(name + "/shards", name, log),
        replicas_(name + "/replicas", name, log),
        unit_(std::make_shared<hsdp::Unit>()) {
    std::optional<std::string> replica_group;
    if (replicates) replica_group = replicas_.name();
    unit_->group = std::make_shared<hsdp::ParamGroup>(
        std::vector{hsdp::StoredParam{{{4}}, at::kFloat}}, hsdp::Precision{}, at::kCPU,
        std::make_shared<hsdp::Collectives>(shards_.name(), replica_group, kThisRank));
    group().set_name(name);
    group().ShardFull({at::ones({4})});
    full_ = group().EmptyFull().at(0).requires_grad_();
    group().BindFull({{full_, full_}}, {0}, [](size_t) {});
    unit_->on_reduced = [this, name, &log] {
      log.push_back("reduced " + name);
      group().reducer().Drop();
    };
  }

  const hsdp::UnitPtr& unit() const { return unit_; }
  hsdp::ParamGroup& group() const { return *unit_->group; }
  /// What autograd has left for the next reduction.
  at::Tensor& grad() { return full_.mutable_grad(); }
  /// The last all-gather or reduce-scatter.
  FakeWork& shard_work() const { return shards_.backend().last(); }
  /// The last all-reduce.
  FakeWork& replica_work() const { return replicas_.backend().last(); }

 private:
  FakeGroup shards_, replicas_;
  hsdp::UnitPtr unit_;
  at::Tensor full_;
};

/// The message of the torch error that `step` throws; empty if it throws none.
template <typename Step>
std::string ErrorOf(Step step) {
  try {
    step();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return {};
}

}  // namespace fake_units
