#include "pickle/object_costs.h"

#include <gtest/gtest.h>

#include <initializer_list>
#include <limits>
#include <string>
#include <utility>

#include "error_of.h"

namespace hsdp_ckpt {
namespace {

using pickle::ObjectCosts;
using pickle::ObjectItems;
using pickle::ObjectPtr;
using pickle::ObjectValue;

constexpr uint64_t kNoLimit = pickle::kHugeObject;
const std::string kTooMuch = "object: its pickle makes more than its own size";

const pickle::TorchNames kNames{
    {{"__builtin__", "builtins"}},
    {{{"__builtin__", "xrange"}, {"builtins", "range"}}},
    {"torch.Tensor", "torch.FloatStorage"},
    {{"FloatStorage", 4}, {"DoubleStorage", 8}},
};

ObjectPtr None() { return std::make_shared<ObjectValue>(); }

ObjectPtr Number(int64_t number) {
  ObjectPtr value = None();
  value->number = number;
  return value;
}

ObjectPtr Text(std::string_view text) {
  ObjectPtr value = None();
  value->text = text;
  value->length = text.size();
  return value;
}

ObjectPtr List(uint64_t length) {
  ObjectPtr value = None();
  value->length = length;
  return value;
}

ObjectPtr Tuple(ObjectItems items) {
  ObjectPtr value = List(items.size());
  value->items = std::move(items);
  return value;
}

ObjectPtr Tensor(uint64_t elements) {
  ObjectPtr value = None();
  value->elements = elements;
  return value;
}

ObjectPtr Function(std::string name) {
  ObjectPtr value = None();
  value->global = std::move(name);
  return value;
}

ObjectCosts Costs(uint64_t limit = kNoLimit, const pickle::EntrySizes* entries = nullptr) {
  return {kNames, "object", limit, entries};
}

ObjectPtr Call(ObjectCosts& costs, const std::string& name, ObjectItems items) {
  return costs.Call(*Function(name), *Tuple(std::move(items)));
}

std::string ErrorOfCall(const std::string& name, const ObjectItems& items,
                        uint64_t limit = kNoLimit) {
  ObjectCosts costs = Costs(limit);
  return ErrorOf([&] { Call(costs, name, items); });
}

// ("storage", class, key, location, elements)
ObjectPtr StorageId(const std::string& kind, const std::string_view key, ObjectPtr elements) {
  return Tuple({Text("storage"), Function(kind), Text(key), Text("cpu"), std::move(elements)});
}

std::string ErrorOfStorage(ObjectCosts& costs, const ObjectPtr& id) {
  return ErrorOf([&] { costs.Storage(*id); });
}

TEST(ObjectCostsTest, GlobalsOfPython2AreRenamed) {
  const ObjectCosts costs = Costs();
  EXPECT_EQ(costs.Global("__builtin__", "set")->global, "builtins.set");
  EXPECT_EQ(costs.Global("__builtin__", "xrange")->global, "builtins.range");
  EXPECT_EQ(costs.Global("torch", "Size")->global, "torch.Size");
}

// ---- storages

TEST(ObjectCostsTest, StoragesOfAnArchiveAreHeldByTheirEntries) {
  const pickle::EntrySizes entries{{"data/0", 40}, {"data/1", 7}};
  ObjectCosts costs = Costs(0, &entries);  // they cost nothing beyond
  EXPECT_EQ(costs.Storage(*StorageId("torch.FloatStorage", "0", Number(10)))->elements, 10u);
  EXPECT_EQ(costs.Storage(*StorageId("torch.FloatStorage", "0", Number(10)))->elements, 10u);
  EXPECT_EQ(costs.Storage(*StorageId("torch.storage.UntypedStorage", "1", Number(7)))->elements,
            7u);
  EXPECT_EQ(ErrorOfStorage(costs, StorageId("torch.FloatStorage", "0", Number(9))),
            "object: its pickle has two sizes for storage 0");
  EXPECT_EQ(ErrorOfStorage(costs, StorageId("torch.FloatStorage", "2", Number(1))),
            "object: its pickle makes storage 2 of 4 bytes, which has 0");
  ObjectCosts others = Costs(0, &entries);
  EXPECT_EQ(ErrorOfStorage(others, StorageId("torch.DoubleStorage", "0", Number(6))),
            "object: its pickle makes storage 0 of 48 bytes, which has 40");
}

TEST(ObjectCostsTest, StoragesWithoutAnArchiveCostWhatTheyClaimOnce) {
  ObjectCosts costs = Costs(40);
  const ObjectPtr id = StorageId("torch.FloatStorage", "7", Number(10));
  EXPECT_EQ(ErrorOfStorage(costs, id), "no error");
  EXPECT_EQ(ErrorOfStorage(costs, id), "no error");
  EXPECT_EQ(ErrorOfStorage(costs, StorageId("torch.FloatStorage", "8", Number(1))), kTooMuch);
}

TEST(ObjectCostsTest, StoragesThatNoSaveWritesAreRefused) {
  const auto error_of = [](const ObjectPtr& id) {
    ObjectCosts costs = Costs();
    return ErrorOfStorage(costs, id);
  };
  const std::string kind = "torch.FloatStorage";
  EXPECT_EQ(error_of(None()), "object: its pickle names a storage by too few values");
  EXPECT_EQ(error_of(Tuple({None(), None(), None(), None()})),
            "object: its pickle names a storage by too few values");
  const std::string no_number = "object: its pickle names a storage by something that is no number";
  EXPECT_EQ(error_of(StorageId(kind, "", Number(1))), no_number);
  EXPECT_EQ(error_of(StorageId(kind, "0x", Number(1))), no_number);
  EXPECT_EQ(error_of(Tuple({None(), Function(kind), Number(0), None(), Number(1)})), no_number);
  const std::string no_size = "object: its pickle makes storage 0 of a size that none has";
  for (const int64_t elements :
       {int64_t{-1}, std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()}) {
    EXPECT_EQ(error_of(StorageId(kind, "0", Number(elements))), no_size);
  }
  EXPECT_EQ(error_of(StorageId(kind, "0", Text("1"))), no_size);
  EXPECT_EQ(error_of(StorageId("torch.OtherStorage", "0", Number(1))),
            "object: its pickle names a storage type that torch does not have: \"OtherStorage\"");
  // No product of a count and an item's size wraps around.
  EXPECT_EQ(error_of(StorageId("torch.DoubleStorage", "0", Number((int64_t{1} << 62) - 1))),
            "no error");
  ObjectCosts costs = Costs(1000);
  EXPECT_EQ(ErrorOfStorage(costs, StorageId("torch.DoubleStorage", "0", Number(int64_t{1} << 61))),
            kTooMuch);
}

// ---- calls

TEST(ObjectCostsTest, ACallCostsWhatItMayCopy) {
  const ObjectItems items{List(10), Tuple({List(5), List(7)})};
  constexpr uint64_t kCost = 11 + 3 + 5 + 7;
  EXPECT_EQ(ErrorOfCall("builtins.set", items, kCost), "no error");
  EXPECT_EQ(ErrorOfCall("builtins.set", items, kCost - 1), kTooMuch);
  ObjectCosts costs = Costs();
  EXPECT_EQ(Call(costs, "builtins.set", items)->length, kCost);
  EXPECT_EQ(ErrorOf([&] { costs.Call(*Function("builtins.set"), *List(3)); }),
            "object: its pickle calls builtins.set without arguments in a tuple");
}

TEST(ObjectCostsTest, TheLimitIsOfAllCallsTogether) {
  ObjectCosts costs = Costs(25);
  for (int i = 0; i < 5; ++i) Call(costs, "builtins.set", {List(4)});
  EXPECT_EQ(ErrorOf([&] { Call(costs, "builtins.set", {None()}); }), kTooMuch);
  EXPECT_EQ(ErrorOf([&] { costs.SetState(*None()); }), kTooMuch);
}

TEST(ObjectCostsTest, HugeSizesDoNotWrapAround) {
  const ObjectItems items(9, List(pickle::kHugeObject));
  EXPECT_EQ(ErrorOfCall("builtins.set", items, 1000), kTooMuch);
}

TEST(ObjectCostsTest, BytesAreMadeFromBytesOnly) {
  ObjectCosts costs = Costs(100);
  const ObjectPtr bytes = Call(costs, "_codecs.encode", {Text("0123456789"), Text("latin1")});
  EXPECT_TRUE(bytes->is_bytes);
  EXPECT_EQ(bytes->length, 10u);
  EXPECT_EQ(Call(costs, "builtins.bytearray", {bytes})->length, 10u);
  EXPECT_EQ(Call(costs, "builtins.bytearray", {})->length, 0u);
  EXPECT_EQ(ErrorOf([&] {
              for (int i = 0; i < 9; ++i) Call(costs, "builtins.bytearray", {bytes});
            }),
            kTooMuch);
  const std::string refused = "object: its pickle makes bytes by ";
  const std::string not_held = ", not from bytes that it holds";
  for (const ObjectItems& items :
       {ObjectItems{Number(1 << 30)}, {Text("text")}, {bytes, bytes}, {List(3)}}) {
    EXPECT_EQ(ErrorOfCall("builtins.bytearray", items), refused + "builtins.bytearray" + not_held);
  }
  for (const ObjectItems& items :
       {ObjectItems{}, {Text("a")}, {Text("a"), Text("hex")}, {bytes, Text("latin1")}}) {
    EXPECT_EQ(ErrorOfCall("_codecs.encode", items), refused + "_codecs.encode" + not_held);
  }
}

TEST(ObjectCostsTest, ClassesOfTensorsAreNotCalled) {
  EXPECT_EQ(ErrorOfCall("torch.Tensor", {Number(3)}),
            "object: its pickle makes a tensor by torch.Tensor, not from bytes that it holds");
  EXPECT_EQ(ErrorOfCall("torch.FloatStorage", {}),
            "object: its pickle makes a tensor by torch.FloatStorage, not from bytes that it "
            "holds");
}

// ---- tensors

/// Arguments of torch._utils._rebuild_tensor_v2, for a storage of 24 elements.
ObjectItems Strided(int64_t offset, std::initializer_list<int64_t> sizes,
                    std::initializer_list<int64_t> strides) {
  const auto tuple = [](std::initializer_list<int64_t> numbers) {
    ObjectItems items;
    for (const int64_t number : numbers) items.push_back(Number(number));
    return Tuple(std::move(items));
  };
  return {Tensor(24), Number(offset), tuple(sizes), tuple(strides)};
}

const std::string kRebuild = "torch._utils._rebuild_tensor_v2";

TEST(ObjectCostsTest, TensorsLieInTheirStorage) {
  ObjectCosts costs = Costs();
  EXPECT_EQ(Call(costs, kRebuild, Strided(0, {4, 6}, {6, 1}))->elements, 24u);
  EXPECT_EQ(Call(costs, kRebuild, Strided(23, {}, {}))->elements, 1u);
  EXPECT_EQ(Call(costs, kRebuild, Strided(100, {0, 9}, {9, 1}))->elements, 0u);
  EXPECT_EQ(Call(costs, kRebuild, Strided(0, {1 << 30}, {0}))->elements, uint64_t{1} << 30);
  const std::string larger = "object: its pickle makes a tensor larger than its storage";
  EXPECT_EQ(ErrorOfCall(kRebuild, Strided(0, {5, 6}, {6, 1})), larger);
  EXPECT_EQ(ErrorOfCall(kRebuild, Strided(1, {4, 6}, {6, 1})), larger);
  EXPECT_EQ(ErrorOfCall(kRebuild, Strided(24, {}, {})), larger);
  ObjectItems no_storage = Strided(0, {1}, {1});
  no_storage[0] = None();
  EXPECT_EQ(ErrorOfCall(kRebuild, no_storage), larger);
  // Products beyond 64 and beyond 127 bits.
  constexpr int64_t kFar = (int64_t{1} << 62) - 1;
  EXPECT_EQ(ErrorOfCall(kRebuild, Strided(0, {kFar, kFar, kFar}, {kFar, kFar, kFar})), larger);
}

TEST(ObjectCostsTest, ShapesThatNoTensorHasAreRefused) {
  const std::string no_shape = "object: its pickle makes a tensor of a shape that none has";
  EXPECT_EQ(ErrorOfCall(kRebuild, {}), no_shape);
  EXPECT_EQ(ErrorOfCall(kRebuild, Strided(0, {2}, {})), no_shape);
  EXPECT_EQ(ErrorOfCall(kRebuild, Strided(0, {-1}, {1})), no_shape);
  EXPECT_EQ(ErrorOfCall(kRebuild, Strided(0, {2}, {-1})), no_shape);
  EXPECT_EQ(ErrorOfCall(kRebuild, Strided(0, {std::numeric_limits<int64_t>::max()}, {0})),
            no_shape);
  ObjectItems text = Strided(0, {2}, {1});
  text[2] = Tuple({Text("2")});
  EXPECT_EQ(ErrorOfCall(kRebuild, text), no_shape);
}

// A tensor may be larger than its storage by a stride of 0; who goes through its elements pays.
TEST(ObjectCostsTest, ElementsThatAreCopiedArePaidFor) {
  const auto error_of = [](const std::string& name, ObjectPtr argument) {
    return ErrorOfCall(name, {std::move(argument)}, 1000);
  };
  const ObjectPtr large = Tensor(2000), small = Tensor(10);
  for (const std::string name :
       {"builtins.set", "collections.Counter", "collections.OrderedDict", "torch.Size",
        "torch._utils._rebuild_device_tensor_from_numpy", "torch._utils._rebuild_sparse_tensor",
        "torch._utils._rebuild_nested_tensor"}) {
    EXPECT_EQ(error_of(name, large), kTooMuch) << name;
    EXPECT_EQ(error_of(name, Tuple({large})), kTooMuch) << name;
    EXPECT_EQ(error_of(name, small), "no error") << name;
  }
  EXPECT_EQ(error_of("torch._utils._rebuild_parameter", large), "no error");
}

TEST(ObjectCostsTest, AQuantizedTensorIsCopied) {
  const std::string name = "torch._utils._rebuild_qtensor";
  EXPECT_EQ(ErrorOfCall(name, Strided(0, {4, 6}, {6, 1}), 1000), "no error");
  EXPECT_EQ(ErrorOfCall(name, Strided(0, {2000}, {0}), 1000), kTooMuch);
}

TEST(ObjectCostsTest, WhatARebuiltValueHoldsIsKnownOrCountsAsAny) {
  ObjectCosts costs = Costs();
  EXPECT_EQ(Call(costs, "torch._utils._rebuild_parameter", {Tensor(5)})->elements, 5u);
  EXPECT_EQ(Call(costs, "torch._utils._rebuild_other", {})->elements, pickle::kHugeObject);
  EXPECT_FALSE(Call(costs, "collections.OrderedDict", {})->elements.has_value());
  EXPECT_EQ(ErrorOfCall("torch._utils._rebuild_parameter", {}),
            "object: its pickle calls torch._utils._rebuild_parameter without arguments");
}

// ---- _rebuild_from_type_v2(function, type, arguments, state)

const std::string kFromType = "torch._tensor._rebuild_from_type_v2";

TEST(ObjectCostsTest, ACallByWayOfAnotherIsThatCall) {
  const ObjectPtr type = Function("torch.Tensor");
  const ObjectItems bomb{Function("builtins.bytearray"), type, Tuple({Number(1 << 30)}), None()};
  EXPECT_EQ(ErrorOfCall(kFromType, bomb),
            "object: its pickle makes bytes by builtins.bytearray, not from bytes that it holds");
  ObjectCosts costs = Costs();
  const ObjectPtr arguments = Tuple(Strided(0, {4, 6}, {6, 1}));
  EXPECT_EQ(Call(costs, kFromType, {Function(kRebuild), type, arguments, None()})->elements, 24u);
  // A state may hold other data for the tensor.
  EXPECT_EQ(Call(costs, kFromType, {Function(kRebuild), type, arguments, List(1)})->elements,
            pickle::kHugeObject);
  EXPECT_EQ(ErrorOfCall(kFromType, {Function(kRebuild), type, arguments, List(5000)}, 1000),
            kTooMuch);
}

TEST(ObjectCostsTest, CallsByWayOfOthersAreNestedNoDeeperThanTorchNestsThem) {
  const auto nested = [](int levels) {
    ObjectItems items{Function("builtins.set"), None(), Tuple({}), None()};
    for (int i = 1; i < levels; ++i)
      items = {Function(kFromType), None(), Tuple(std::move(items)), None()};
    return items;
  };
  const std::string refused = "object: its pickle calls " + kFromType + " as torch does not";
  EXPECT_EQ(ErrorOfCall(kFromType, nested(100)), "no error");
  EXPECT_EQ(ErrorOfCall(kFromType, nested(101)), refused);
  EXPECT_EQ(ErrorOfCall(kFromType, {None(), None(), None()}), refused);
}

TEST(ObjectValueTest, IsLetGoWithoutRecursion) {
  ObjectPtr value = None();
  for (int i = 0; i < 1 << 20; ++i) value = Tuple({std::move(value)});
  const ObjectPtr shared = value->items->front();
  value.reset();
  EXPECT_EQ(shared.use_count(), 1);
  EXPECT_EQ(shared->length, 1u);
}

}  // namespace
}  // namespace hsdp_ckpt
