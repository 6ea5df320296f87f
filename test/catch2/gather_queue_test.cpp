#include "hsdp/gather_queue.h"

#include <string>

#include "catch2.h"
#include "fake_units.h"

namespace hsdp = hsdp_ckpt::hsdp;

namespace {

using fake_units::ErrorOf;
using fake_units::FakeUnit;
using fake_units::kThisRank;
using fake_units::Log;
using hsdp::BackwardPrefetch;
using hsdp::GatherQueue;
using State = hsdp::ParamGroup::State;

struct ThreeUnits {
  Log log;
  FakeUnit a{"a", log}, b{"b", log}, c{"c", log};

  hsdp::UnitSequence all() const { return {a.unit(), b.unit(), c.unit()}; }
};

// Backward comes to `unit`.
void Reach(GatherQueue& queue, const hsdp::UnitPtr& unit) {
  queue.Start(unit);
  queue.Unshard(unit);
}

}  // namespace

TEST_CASE("a backward's gathers are queued in its order", "[schedule]") {
  ThreeUnits units;
  GatherQueue queue(BackwardPrefetch::kNone, kThisRank);
  CHECK(queue.empty());

  SECTION("all of them") {
    queue.Begin(units.all());
    CHECK(queue.next() == units.a.unit());
    queue.StartNext();
    CHECK(queue.next() == units.b.unit());
    queue.StartNext();
    queue.StartNext();
    CHECK(queue.empty());
    CHECK(units.log == Log{"gather a", "gather b", "gather c"});
  }
  SECTION("but for units that are not sharded") {
    units.a.group().StartGather();
    units.b.group().Unshard();
    queue.Begin(units.all());
    CHECK(queue.next() == units.c.unit());
    queue.StartNext();
    CHECK(queue.empty());
  }
  SECTION("those that a user names come behind the unit that they are named for, once") {
    FakeUnit other("other", units.log);  // its forward has not run
    units.a.unit()->backward_prefetch = {units.c.unit(), other.unit(), units.a.unit()};
    queue.Begin(units.all());
    for (int unit = 0; unit < 3; ++unit) queue.StartNext();
    CHECK(queue.empty());
    CHECK(units.log == Log{"gather a", "gather c", "gather b"});
  }
  SECTION("and those of the backward before are forgotten") {
    queue.Begin(units.all());
    queue.Begin({units.c.unit()});
    CHECK(queue.next() == units.c.unit());
    queue.Clear();
    CHECK(queue.empty());
  }
}

TEST_CASE("a unit that is reached has all gathers before it started", "[schedule]") {
  ThreeUnits units;
  GatherQueue queue(BackwardPrefetch::kNone, kThisRank);
  queue.Begin(units.all());

  SECTION("to use it") {
    Reach(queue, units.b.unit());
    CHECK(units.log == Log{"gather a", "gather b", "wait for gather b"});
    CHECK(units.a.group().state() == State::kGathering);
    CHECK(units.b.group().state() == State::kUnsharded);
    Reach(queue, units.a.unit());  // later than a unit behind it: its gather has been started
    CHECK(units.log.back() == "wait for gather a");
    CHECK(units.a.group().state() == State::kUnsharded);
    CHECK(queue.next() == units.c.unit());
  }
  SECTION("without waiting for it") {
    queue.StartThrough(units.b.unit());
    queue.StartThrough(units.a.unit());  // not queued any more
    CHECK(units.log == Log{"gather a", "gather b"});
  }
  SECTION("and once more if it was freed meanwhile") {
    Reach(queue, units.a.unit());
    units.a.group().Reshard();
    units.log.clear();
    Reach(queue, units.a.unit());
    CHECK(units.log == Log{"gather a", "wait for gather a"});
    CHECK(queue.next() == units.b.unit());
  }
  SECTION("also when the queue has forgotten it") {
    queue.Clear();
    Reach(queue, units.c.unit());
    CHECK(units.log == Log{"gather c", "wait for gather c"});
  }
}

TEST_CASE("backward starts the next gather when it is told to", "[schedule]") {
  ThreeUnits units;
  const BackwardPrefetch prefetch =
      GENERATE(BackwardPrefetch::kNone, BackwardPrefetch::kPre, BackwardPrefetch::kPost);
  GatherQueue queue(prefetch, kThisRank);
  queue.Begin(units.all());
  Reach(queue, units.a.unit());
  const bool before_use = prefetch == BackwardPrefetch::kPre;
  const Log early{"gather a", "gather b", "wait for gather a"};
  const Log late{"gather a", "wait for gather a"};
  CHECK(units.log == (before_use ? early : late));
  queue.GradientsComplete(*units.a.unit());
  const bool b_is_ahead = prefetch != BackwardPrefetch::kNone;
  CHECK(units.b.group().state() == (b_is_ahead ? State::kGathering : State::kSharded));
  CHECK(queue.next() == (b_is_ahead ? units.c : units.b).unit());
}

TEST_CASE("at most one gather is ahead of its use", "[schedule]") {
  ThreeUnits units;
  GatherQueue queue(BackwardPrefetch::kPre, kThisRank);
  queue.Begin(units.all());
  Reach(queue, units.a.unit());
  REQUIRE(units.b.group().state() == State::kGathering);

  SECTION("a second one is not started") {
    Reach(queue, units.a.unit());
    CHECK(units.c.group().state() == State::kSharded);
  }
  SECTION("until the first one is used") {
    Reach(queue, units.b.unit());
    CHECK(units.c.group().state() == State::kGathering);
    CHECK(queue.empty());
    Reach(queue, units.c.unit());  // nothing is left to prefetch
    CHECK(units.c.group().state() == State::kUnsharded);
  }
  SECTION("or waited for by somebody else") {
    units.b.group().Unshard();
    Reach(queue, units.a.unit());
    CHECK(units.c.group().state() == State::kGathering);
  }
  SECTION("or dropped") {
    units.b.group().Reshard();
    Reach(queue, units.a.unit());
    CHECK(units.c.group().state() == State::kGathering);
  }
  SECTION("or its backward is over") {
    queue.Clear();
    queue.Begin({units.c.unit()});
    Reach(queue, units.a.unit());
    CHECK(units.c.group().state() == State::kGathering);
  }
}

TEST_CASE("a unit that was freed is gathered before the next one", "[schedule]") {
  ThreeUnits units;
  GatherQueue queue(BackwardPrefetch::kPre, kThisRank);
  queue.Begin({units.b.unit()});
  Reach(queue, units.a.unit());
  CHECK(units.log == Log{"gather a", "gather b", "wait for gather a"});
}

TEST_CASE("what a user names is prefetched instead of the next unit", "[schedule]") {
  ThreeUnits units;
  FakeUnit d("d", units.log);
  const hsdp::UnitSequence order{units.a.unit(), units.b.unit(), units.c.unit(), d.unit()};
  const BackwardPrefetch prefetch =
      GENERATE(BackwardPrefetch::kNone, BackwardPrefetch::kPre, BackwardPrefetch::kPost);
  GatherQueue queue(prefetch, kThisRank);

  SECTION("all that are named") {
    units.a.unit()->backward_prefetch = {units.c.unit(), units.b.unit()};
    queue.Begin(order);
    Reach(queue, units.a.unit());
    CHECK(units.log == Log{"gather a", "gather c", "gather b", "wait for gather a"});
    CHECK(queue.next() == d.unit());
  }
  SECTION("and nothing else, if those are there already") {
    units.a.unit()->backward_prefetch = {units.c.unit()};
    units.c.group().Unshard();
    queue.Begin(order);
    Reach(queue, units.a.unit());
    queue.GradientsComplete(*units.a.unit());
    CHECK(queue.next() == units.b.unit());
  }
  SECTION("and nothing else ahead of its use") {
    units.a.unit()->backward_prefetch = {units.c.unit()};
    queue.Begin(order);
    Reach(queue, units.a.unit());
    Reach(queue, units.b.unit());
    queue.GradientsComplete(*units.b.unit());
    CHECK(queue.next() == d.unit());
  }
}

TEST_CASE("an all-gather that fails names rank and unit", "[schedule]") {
  ThreeUnits units;
  GatherQueue queue(BackwardPrefetch::kNone, kThisRank);
  queue.Begin(units.all());
  queue.StartNext();
  units.a.shard_work().Fail();
  const std::string error = ErrorOf([&] { Reach(queue, units.a.unit()); });
  CHECK(error.starts_with("rank 7: the all-gather of module a failed: "));
  CHECK(error.find("the wire is cut") != std::string::npos);
}
