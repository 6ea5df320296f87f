#include "hsdp/reduce_queue.h"

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "catch2.h"
#include "fake_units.h"

namespace hsdp = hsdp_ckpt::hsdp;

namespace {

using fake_units::ErrorOf;
using fake_units::FakeUnit;
using fake_units::kThisRank;
using fake_units::Log;
using hsdp::ReduceQueue;

// Three units in the order of a backward that has begun, none of whose gradients are there.
struct Backward {
  explicit Backward(bool replicates = false)
      : a("a", log, replicates), b("b", log, replicates), c("c", log, replicates) {
    queue.Begin({a.unit(), b.unit(), c.unit()});
  }

  void GradientsComplete(const FakeUnit& unit) { queue.GradientsComplete(unit.unit()); }
  // Takes what is over.
  void Look() { queue.Take(ReduceQueue::kInFlight); }
  // What has happened since the last call.
  Log News() { return std::exchange(log, {}); }

  Log log;
  FakeUnit a, b, c;
  hsdp::GatherQueue gathers{hsdp::BackwardPrefetch::kNone, kThisRank};
  ReduceQueue queue{gathers, kThisRank};
};

}  // namespace

TEST_CASE("units that backward has passed are reduced up to the first that it has not",
          "[schedule]") {
  Backward backward;
  const auto is_passed = [&](const hsdp::Unit& unit) { return &unit != backward.b.unit().get(); };
  backward.queue.StartPassed(is_passed);
  CHECK(backward.News() == Log{"reduce-scatter a"});
  backward.GradientsComplete(backward.b);
  CHECK(backward.News() == Log{"reduce-scatter b"});
  backward.queue.StartPassed(is_passed);
  CHECK(backward.queue.all_started());
}

TEST_CASE("reductions start in the queue's order, however gradients come", "[schedule]") {
  Backward backward;
  backward.GradientsComplete(backward.b);
  CHECK(backward.News().empty());
  backward.GradientsComplete(backward.a);
  CHECK(backward.News() == Log{"reduce-scatter a", "reduce-scatter b"});

  SECTION("one more than may be in flight waits for the oldest") {
    backward.GradientsComplete(backward.c);
    CHECK(backward.News() == Log{"reduce-scatter c", "wait for reduce-scatter a", "reduced a"});
    backward.queue.Take(0);
    CHECK(backward.News() ==
          Log{"wait for reduce-scatter b", "reduced b", "wait for reduce-scatter c", "reduced c"});
  }
  SECTION("results are taken in the order of the starts") {
    backward.b.shard_work().Finish();
    backward.Look();
    CHECK(backward.News().empty());
    backward.a.shard_work().Finish();
    backward.Look();
    CHECK(backward.News() == Log{"reduced a", "reduced b"});
  }
  SECTION("one whose gradients come again is reduced again") {
    backward.a.shard_work().Finish();
    backward.Look();
    backward.News();
    backward.GradientsComplete(backward.a);
    CHECK(backward.News() == Log{"reduce-scatter a"});
  }
  SECTION("also if it is in flight, which ends first") {
    backward.GradientsComplete(backward.a);
    CHECK(backward.News() == Log{"wait for reduce-scatter a", "reduced a",
                                 "wait for reduce-scatter b", "reduced b", "reduce-scatter a"});
  }
  SECTION("also if the backward before has left it in flight") {
    backward.queue.Begin({backward.b.unit(), backward.a.unit()});
    CHECK(backward.News().empty());
    backward.GradientsComplete(backward.b);
    CHECK(backward.News() == Log{"wait for reduce-scatter a", "reduced a",
                                 "wait for reduce-scatter b", "reduced b", "reduce-scatter b"});
  }
  SECTION("what is forgotten is not taken") {
    backward.queue.Clear();
    backward.queue.Take(0);
    backward.queue.AllReady();
    backward.queue.StartReady();
    CHECK(backward.News().empty());
  }
}

TEST_CASE("what has no gradient joins when peers need it", "[schedule]") {
  Backward backward;

  SECTION("at the end of backward") {
    backward.queue.StartReady();
    CHECK(backward.News().empty());
    backward.queue.AllReady();
    CHECK(backward.News().empty());
    backward.queue.StartReady();
    CHECK(backward.News() == Log{"reduce-scatter a", "reduce-scatter b", "reduce-scatter c",
                                 "wait for reduce-scatter a", "reduced a"});
  }
  SECTION("up to a unit, and to a number in flight") {
    const auto before_c = [&](const hsdp::Unit& unit) { return unit.name() != "c"; };
    backward.queue.StartWhile(before_c, 0);
    CHECK(backward.News().empty());
    backward.queue.StartWhile(before_c, 1);
    CHECK(backward.News() == Log{"reduce-scatter a"});
    backward.queue.StartWhile(before_c, SIZE_MAX);
    CHECK(backward.News() == Log{"reduce-scatter b"});
    backward.GradientsComplete(backward.c);
    CHECK(backward.News().front() == "reduce-scatter c");
    backward.queue.StartWhile([](const hsdp::Unit&) { return true; }, SIZE_MAX);
    CHECK(backward.News().empty());  // none is queued
  }
}

TEST_CASE("nobody waits for a reduction with gathers left to start", "[schedule]") {
  Backward backward;
  FakeUnit d("d", backward.log);
  backward.gathers.Begin({d.unit()});
  backward.GradientsComplete(backward.a);
  backward.GradientsComplete(backward.b);
  backward.News();

  SECTION("it is asked for patiently") {
    backward.a.shard_work().FinishAfter(9);
    backward.GradientsComplete(backward.c);
    CHECK(backward.News() == Log{"reduce-scatter c", "reduced a"});
    CHECK_FALSE(backward.gathers.empty());
  }
  SECTION("then a gather starts, which its peers may be waiting for") {
    backward.GradientsComplete(backward.c);
    CHECK(backward.News() ==
          Log{"reduce-scatter c", "gather d", "wait for reduce-scatter a", "reduced a"});
    CHECK(backward.gathers.empty());
  }
}

TEST_CASE("all-reduces start in the order of the reductions", "[schedule]") {
  Backward backward(/*replicates=*/true);
  backward.GradientsComplete(backward.a);
  backward.GradientsComplete(backward.b);
  CHECK(backward.News() == Log{"reduce-scatter a", "reduce-scatter b"});
  backward.b.shard_work().Finish();
  backward.Look();
  CHECK(backward.News().empty());
  backward.a.shard_work().Finish();
  backward.Look();
  CHECK(backward.News() == Log{"all-reduce a", "all-reduce b"});
  backward.b.replica_work().Finish();
  backward.Look();
  CHECK(backward.News().empty());
  backward.a.replica_work().Finish();
  backward.Look();
  CHECK(backward.News() == Log{"reduced a", "reduced b"});
}

TEST_CASE("sums without an all-reduce wait for one", "[schedule]") {
  Backward backward(/*replicates=*/true);
  backward.a.group().reduce_options().all_reduce = false;
  backward.GradientsComplete(backward.a);
  backward.queue.Take(0);
  CHECK(backward.News() == Log{"reduce-scatter a", "wait for reduce-scatter a"});
  CHECK(backward.a.group().reducer().has_partial());
  backward.a.group().reduce_options().all_reduce = true;
  backward.GradientsComplete(backward.a);
  backward.queue.Take(0);
  CHECK(backward.News() == Log{"reduce-scatter a", "wait for reduce-scatter a", "all-reduce a",
                               "wait for all-reduce a", "reduced a"});
  CHECK_FALSE(backward.a.group().reducer().has_partial());
}

TEST_CASE("an error of this rank alone is kept until its peers have what they need", "[schedule]") {
  Backward backward;

  SECTION("a gradient that can't be taken: zeros are sent") {
    backward.a.grad() = at::ones({4}, at::kDouble);
    backward.GradientsComplete(backward.a);
    CHECK(backward.News() == Log{"reduce-scatter a"});
    CHECK_FALSE(backward.a.grad().defined());
    backward.queue.Take(0);
    CHECK(backward.News() == Log{"wait for reduce-scatter a", "reduced a"});
    const std::string error = ErrorOf([&] { backward.queue.RethrowKept(); });
    CHECK(error.starts_with("rank 7: the reduction of module a failed: a gradient of sizes [4]"));
    CHECK_NOTHROW(backward.queue.RethrowKept());
  }
  SECTION("a hook that raises: its result is dropped, the first error is the one to hear of") {
    backward.a.unit()->on_reduced = [] { throw std::runtime_error("a"); };
    backward.b.unit()->on_reduced = [] { throw std::logic_error("b"); };
    for (const FakeUnit* unit : {&backward.a, &backward.b, &backward.c}) {
      backward.GradientsComplete(*unit);
    }
    backward.queue.Take(0);
    CHECK(backward.log.back() == "reduced c");
    backward.News();
    CHECK_THROWS_AS(backward.queue.RethrowKept(), std::runtime_error);
    CHECK_NOTHROW(backward.queue.RethrowKept());
    backward.GradientsComplete(backward.a);  // its reducer is free again
    CHECK(backward.News() == Log{"reduce-scatter a"});
  }
  SECTION("and forgotten by the next backward, and by Clear") {
    const bool clears = GENERATE(false, true);
    backward.a.unit()->on_reduced = [] { throw std::runtime_error("a"); };
    backward.GradientsComplete(backward.a);
    backward.queue.Take(0);
    if (clears) {
      backward.queue.Clear();
    } else {
      backward.queue.Begin({});
    }
    CHECK_NOTHROW(backward.queue.RethrowKept());
  }
}

TEST_CASE("a reduction that fails on the wire names rank and unit at once", "[schedule]") {
  Backward backward;
  backward.GradientsComplete(backward.a);
  backward.a.shard_work().Fail();
  const std::string error = ErrorOf([&] { backward.queue.Take(0); });
  CHECK(error.starts_with("rank 7: the reduction of module a failed: "));
  CHECK(error.find("the wire is cut") != std::string::npos);
}
