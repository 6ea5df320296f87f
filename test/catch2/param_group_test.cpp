#include "hsdp/param_group.h"

#include <memory>

#include "catch2.h"
#include "fake_units.h"

namespace hsdp = hsdp_ckpt::hsdp;

namespace {

using fake_units::FakeGroup;
using fake_units::FakeUnit;
using fake_units::kThisRank;
using fake_units::Log;

// A unit whose forward leaves its parameters among a part of its shard group.
struct UnitAmongFewer {
  Log log;
  FakeUnit unit{"a", log};
  FakeGroup neighbours{"a/neighbours", "among the neighbours", log};

  UnitAmongFewer() {
    unit.group().SetReshardTo(
        std::make_shared<hsdp::Collectives>(neighbours.name(), std::nullopt, kThisRank));
  }
};

}  // namespace

TEST_CASE_METHOD(UnitAmongFewer, "what a forward leaves among fewer ranks is what backward gathers",
                 "[schedule]") {
  unit.group().Unshard();
  unit.group().ReshardAfterForward();
  CHECK(unit.group().is_resharded_to_fewer());
  unit.group().Unshard();
  CHECK_FALSE(unit.group().is_resharded_to_fewer());
  unit.group().Reshard();
  unit.group().Unshard();
  CHECK(log == Log{"gather a", "wait for gather a", "gather among the neighbours",
                   "wait for gather among the neighbours", "gather a", "wait for gather a"});
}

TEST_CASE_METHOD(UnitAmongFewer, "a forward forgets what the last one has left among fewer ranks",
                 "[schedule]") {
  unit.group().Unshard();
  unit.group().ReshardAfterForward();

  SECTION("when it frees") { unit.group().Reshard(); }
  SECTION("when a user sets something else") { unit.group().SetReshardTo(nullptr); }
  CHECK_FALSE(unit.group().is_resharded_to_fewer());
  log.clear();
  unit.group().StartGather();
  CHECK(log == Log{"gather a"});
}
