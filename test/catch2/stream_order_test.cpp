// What streams order and what the host does, with a backend that returns a work for everything, as
// torch 2.15's for NCCL does, and says of none that it is over. No GPU is needed: nobody looks into
// the memory of a device.
#include <ATen/ATen.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "catch2.h"
#include "fake_units.h"
#include "hsdp/stream_reduction.h"

namespace hsdp = hsdp_ckpt::hsdp;

namespace {

using fake_units::Abilities;
using fake_units::FakeGroup;
using fake_units::kThisRank;
using fake_units::Log;

// Four elements that say they are on a GPU.
at::Tensor OnDevice() {
  static float memory[4] = {};
  const at::Device device(at::kCUDA, 0);
  return at::from_blob(
      memory, {4}, [](void*) {}, at::TensorOptions(at::kFloat).device(device), device);
}

// Two shards times two replicas.
struct Groups {
  Groups(const std::string& unit, Log& log, const Abilities& abilities = {})
      : shards(unit + "/shards", unit, log, abilities),
        replicas(unit + "/replicas", unit, log, abilities),
        collectives(
            std::make_shared<hsdp::Collectives>(shards.name(), replicas.name(), kThisRank)) {}

  FakeGroup shards, replicas;
  std::shared_ptr<hsdp::Collectives> collectives;
};

// Reductions on a device, whose buckets are on the CPU.
struct DeviceReduction {
  DeviceReduction(const std::string& unit, Log& log, const Abilities& abilities = {})
      : groups(unit, log, abilities) {
    const hsdp::GradSpec spec{{{4}}, at::kFloat, at::kFloat, at::kFloat};
    grads = std::make_shared<hsdp::UnitGrads>(hsdp::UnitGrads{
        unit, at::Device(at::kCUDA, 0), groups.collectives, std::make_shared<hsdp::DeviceStreams>(),
        hsdp::MakeBuckets({spec}, *groups.collectives, at::kCPU, hsdp::SentBy::kCollectives)});
    reduction = std::make_unique<hsdp::StreamReduction>(grads);
  }

  void Start() {
    hsdp::Pack(*grads->buckets.at(0), {at::ones({4})});
    reduction->Allocate();
    reduction->Start({});
  }

  Groups groups;
  std::shared_ptr<hsdp::UnitGrads> grads;
  std::unique_ptr<hsdp::StreamReduction> reduction;
};

}  // namespace

TEST_CASE("on a stream the all-reduce is behind its reduce-scatter at once", "[schedule]") {
  Log log;
  DeviceReduction a("a", log), b("b", log);
  a.Start();
  b.Start();
  CHECK(log == Log{"reduce-scatter a", "wait for reduce-scatter a", "all-reduce a",
                   "wait for all-reduce a", "reduce-scatter b", "wait for reduce-scatter b",
                   "all-reduce b", "wait for all-reduce b"});
  log.clear();
  CHECK(a.reduction->Advance(/*wait=*/false));
  CHECK(b.reduction->Advance(/*wait=*/false));
  CHECK(log.empty());
}

TEST_CASE("where the host orders a device's operations nobody waits in between", "[schedule]") {
  Log log;
  DeviceReduction a("a", log, {.name = "gloo"}), b("b", log, {.name = "gloo"});
  a.Start();
  b.Start();
  CHECK(log == Log{"reduce-scatter a", "reduce-scatter b"});
  CHECK_FALSE(a.reduction->Advance(/*wait=*/false));
  a.groups.shards.backend().last().Finish();
  CHECK(a.reduction->Advance(/*wait=*/false));
  CHECK(log.at(2) == "all-reduce a");
}

TEST_CASE("collectives on a device leave no works", "[schedule]") {
  Log log;
  Groups groups("a", log);
  const hsdp::Collectives& collectives = *groups.collectives;
  CHECK_FALSE(collectives.host_orders(at::kCUDA));
  CHECK(collectives.ReduceScatter({OnDevice()}, {{OnDevice(), {}}}, /*average=*/false).empty());
  CHECK(collectives.AllReduce(OnDevice(), /*average=*/false).empty());
  CHECK(collectives.BroadcastFirst(OnDevice()).empty());
  CHECK(log == Log{"reduce-scatter a", "wait for reduce-scatter a", "all-reduce a",
                   "wait for all-reduce a", "broadcast a", "wait for broadcast a"});
  CHECK_FALSE(collectives.AllReduce(at::ones({4}), /*average=*/false).empty());
}

TEST_CASE("what a backend can do is asked of the backend, not of its name", "[schedule]") {
  Log log;
  const auto abilities_of = [&](const Abilities& abilities) {
    Groups groups("a", log, abilities);
    return std::pair(groups.collectives->coalesces_gathers(at::kCUDA),
                     groups.collectives->averages(at::kCUDA, at::kFloat));
  };
  CHECK(abilities_of({.name = "nccl2", .coalesces = true}) == std::pair(true, true));
  CHECK(abilities_of({.name = "nccl", .coalesces = false}) == std::pair(false, true));
  CHECK(abilities_of({.name = "gloo"}) == std::pair(false, false));
  CHECK_FALSE(Groups("a", log).collectives->averages(at::kCUDA, at::kHalf));
}

TEST_CASE("a backend that refuses to average sums", "[schedule]") {
  Log log;
  Groups groups("a", log, {.averages = false});
  const hsdp::Collectives& collectives = *groups.collectives;
  CHECK(collectives.averages(at::kCUDA, at::kFloat));
  collectives.ReduceScatter({OnDevice()}, {{OnDevice(), {}}}, /*average=*/true);
  CHECK_FALSE(collectives.averages(at::kCUDA, at::kFloat));
  CHECK(log == Log{"reduce-scatter a", "wait for reduce-scatter a"});
}
