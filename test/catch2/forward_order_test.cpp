#include "hsdp/forward_order.h"

#include <memory>

#include "catch2.h"

namespace hsdp = hsdp_ckpt::hsdp;

namespace {

using hsdp::ForwardOrder;
using hsdp::UnitPtr;
using hsdp::UnitSequence;

UnitSequence Units(size_t count) {
  UnitSequence units;
  for (size_t i = 0; i < count; ++i) units.push_back(std::make_shared<hsdp::Unit>());
  return units;
}

// One pass through `calls`, the first of which is the outermost unit.
void Run(ForwardOrder& order, const UnitSequence& calls) {
  order.Begin(calls.front());
  for (const UnitPtr& unit : calls) order.Follow(unit);
  order.CheckEnd();
  order.Keep();
}

}  // namespace

TEST_CASE("the last pass tells what comes next", "[schedule]") {
  const UnitSequence units = Units(3);
  const UnitSequence calls{units[0], units[1], units[2], units[1]};
  ForwardOrder order(units, nullptr, 0);
  order.Begin(units[0]);
  for (const UnitPtr& unit : calls) {
    CHECK(order.Next() == nullptr);  // nothing to go by in the first pass
    order.Follow(unit);
    CHECK_FALSE(order.EndsWith(unit));
  }
  order.CheckEnd();
  order.Keep();
  const int passes = GENERATE(1, 3);
  for (int pass = 0; pass < passes; ++pass) {
    order.Begin(units[0]);
    for (size_t i = 0; i < calls.size(); ++i) {
      CHECK(order.Next() == calls[i]);
      order.Follow(calls[i]);
      CHECK(order.EndsWith(calls[i]) == (i + 1 == calls.size()));
    }
    CHECK(order.Next() == nullptr);
    order.CheckEnd();
    order.Keep();
  }
}

TEST_CASE("calls that are left out do not lose the way", "[schedule]") {
  const UnitSequence units = Units(4);
  ForwardOrder order(units, nullptr, 0);
  Run(order, units);
  order.Begin(units[0]);
  order.Follow(units[0]);
  order.Follow(units[2]);
  CHECK(order.Next() == units[3]);
  order.Follow(units[3]);
  CHECK_FALSE(order.EndsWith(units[3]));  // this pass is another one than the last
  order.CheckEnd();
  order.Keep();
  order.Begin(units[0]);
  order.Follow(units[0]);
  CHECK(order.Next() == units[2]);
}

TEST_CASE("each outermost unit has a pass of its own, and one that raised is none", "[schedule]") {
  const UnitSequence units = Units(3);
  ForwardOrder order(units, nullptr, 0);
  Run(order, {units[0], units[1]});
  Run(order, {units[1], units[2]});
  order.Begin(units[0]);
  order.Follow(units[0]);
  CHECK(order.Next() == units[1]);
  order.LoseTrack();
  order.Begin(units[0]);
  CHECK(order.Next() == units[0]);
  order.Follow(units[0]);
  CHECK(order.Next() == units[1]);
}
