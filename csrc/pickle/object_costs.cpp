#include "pickle/object_costs.h"

#include <algorithm>
#include <array>

#include "base/error.h"

namespace hsdp_ckpt::pickle {
namespace {

using Wide = __int128;  // a size times a stride

constexpr std::string_view kEncode = "_codecs.encode", kByteArray = "builtins.bytearray";
// These go through a tensor's elements, or copy them, if they are given one.
constexpr std::array<std::string_view, 4> kIterators = {"builtins.set", "collections.Counter",
                                                        "collections.OrderedDict", "torch.Size"};
constexpr std::string_view kRebuildFromType = "torch._tensor._rebuild_from_type_v2";
constexpr std::string_view kRebuild = "torch._utils._rebuild_";
// After kRebuild: (storage, offset, sizes, strides, ...).
constexpr std::array<std::string_view, 4> kStrided = {"tensor", "tensor_v2", "tensor_v3",
                                                      "qtensor"};
constexpr std::array<std::string_view, 2> kParameters = {"parameter", "parameter_with_state"};
// After kRebuild, as beginnings: these copy the elements.
constexpr std::array<std::string_view, 4> kCopiers = {"device", "sparse", "nested", "qtensor"};
constexpr int kMaxNestedCalls = 100;  // torch itself nests none

template <size_t N>
bool IsOneOf(const std::array<std::string_view, N>& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

// "tensor_v2" of "torch._utils._rebuild_tensor_v2"; empty for what is no such function.
std::string_view RebuildKind(std::string_view name) {
  return name.starts_with(kRebuild) ? name.substr(kRebuild.size()) : "";
}

bool CopiesElements(std::string_view name) {
  const std::string_view kind = RebuildKind(name);
  return std::any_of(kCopiers.begin(), kCopiers.end(),
                     [&](std::string_view beginning) { return kind.starts_with(beginning); });
}

uint64_t Add(uint64_t a, uint64_t b) { return std::min(a + b, kHugeObject); }

// How many items a call may copy out of this argument.
uint64_t Weight(const ObjectValue& value) {
  uint64_t weight = Add(1, value.length);
  if (!value.items) return weight;
  for (const ObjectPtr& item : *value.items) weight = Add(weight, item->length);
  return weight;
}

uint64_t Weight(const ObjectItems& arguments) {
  uint64_t weight = 0;
  for (const ObjectPtr& argument : arguments) weight = Add(weight, Weight(*argument));
  return weight;
}

// Of the tensors among the arguments, and among what those hold.
uint64_t ElementsIn(const ObjectItems& arguments, int levels) {
  uint64_t elements = 0;
  for (const ObjectPtr& argument : arguments) {
    elements = Add(elements, argument->elements.value_or(0));
    if (levels > 1 && argument->items)
      elements = Add(elements, ElementsIn(*argument->items, levels - 1));
  }
  return elements;
}

bool IsSize(const ObjectValue& value) {
  return value.number && *value.number >= 0 && static_cast<uint64_t>(*value.number) < kHugeObject;
}

bool IsDigits(std::string_view text) {
  return !text.empty() && text.find_first_not_of("0123456789") == std::string_view::npos;
}

bool IsLatin1(const ObjectValue& encoding) {  // how pickle writes bytes: a byte a character
  return encoding.text == "latin1" || encoding.text == "latin-1";
}

}  // namespace

ObjectValue::~ObjectValue() {
  if (!items) return;
  ObjectItems pending = *std::move(items);
  while (!pending.empty()) {
    const ObjectPtr value = std::move(pending.back());
    pending.pop_back();
    if (value.use_count() > 1 || !value->items) continue;
    std::move(value->items->begin(), value->items->end(), std::back_inserter(pending));
    value->items.reset();
  }
}

ObjectCosts::ObjectCosts(const TorchNames& names, std::string what, uint64_t limit,
                         const EntrySizes* entries)
    : names_(names), what_(std::move(what)), limit_(limit), entries_(entries) {}

void ObjectCosts::Fail(const std::string& problem) const {
  throw base::CorruptionError(what_, problem);
}

void ObjectCosts::Spend(uint64_t size) {
  if (size > limit_) Fail("its pickle makes more than its own size");
  limit_ -= size;
}

void ObjectCosts::SetState(const ObjectValue& state) { Spend(Weight(state)); }

ObjectPtr ObjectCosts::Global(std::string_view module, std::string_view attribute) const {
  TorchNames::Global name(module, attribute);
  if (const auto found = names_.renamed_globals.find(name); found != names_.renamed_globals.end()) {
    name = found->second;
  } else if (const auto renamed = names_.renamed_modules.find(name.first);
             renamed != names_.renamed_modules.end()) {
    name.first = renamed->second;
  }
  auto value = std::make_shared<ObjectValue>();
  value->global = name.first + "." + name.second;
  return value;
}

// ---- storages

ObjectPtr ObjectCosts::Storage(const ObjectValue& id) {
  if (!id.items || id.items->size() < 5) Fail("its pickle names a storage by too few values");
  const ObjectValue& key = *(*id.items)[2];
  const ObjectValue& elements = *(*id.items)[4];
  const uint64_t bytes = StorageBytes(*(*id.items)[1], key, elements);
  const std::string name(*key.text);
  const auto [known, first] = storages_.try_emplace(name, bytes);
  if (known->second != bytes) Fail("its pickle has two sizes for storage " + name);
  if (entries_ == nullptr) {
    Spend(first ? bytes : 0);
  } else {
    const auto entry = entries_->find("data/" + name);
    const uint64_t held = entry == entries_->end() ? 0 : entry->second;
    if (bytes > held) {
      Fail("its pickle makes storage " + name + " of " + std::to_string(bytes) +
           " bytes, which has " + std::to_string(held));
    }
  }
  auto value = std::make_shared<ObjectValue>();
  value->elements = static_cast<uint64_t>(*elements.number);
  return value;
}

uint64_t ObjectCosts::StorageBytes(const ObjectValue& kind, const ObjectValue& key,
                                   const ObjectValue& elements) const {
  // As torch.save has them: in others an archive's entry can be named in several ways.
  if (!key.text || !IsDigits(*key.text))
    Fail("its pickle names a storage by something that is no number");
  if (!IsSize(elements)) {
    Fail("its pickle makes storage " + std::string(*key.text) + " of a size that none has");
  }
  const std::string type = kind.global.substr(kind.global.rfind('.') + 1);
  uint64_t item_size = 1;
  if (type != "UntypedStorage") {
    const auto found = names_.storage_item_sizes.find(type);
    if (found == names_.storage_item_sizes.end())
      Fail("its pickle names a storage type that torch does not have: \"" + type + "\"");
    item_size = found->second;
  }
  const Wide bytes = Wide{*elements.number} * static_cast<Wide>(item_size);
  return static_cast<uint64_t>(std::min<Wide>(bytes, kHugeObject));
}

// ---- calls

ObjectPtr ObjectCosts::Call(const ObjectValue& function, const ObjectValue& arguments, int depth) {
  const std::string& name = function.global;
  if (!arguments.items) Fail("its pickle calls " + name + " without arguments in a tuple");
  const ObjectItems& items = *arguments.items;
  if (name == kEncode || name == kByteArray) return MakeBytes(name, items);
  if (names_.tensor_classes.contains(name))
    Fail("its pickle makes a tensor by " + name + ", not from bytes that it holds");
  if (name == kRebuildFromType) return RebuildFromType(items, depth);

  const std::optional<uint64_t> elements = RebuiltElements(name, items);
  uint64_t weight = Weight(items);
  if (IsOneOf(kIterators, name)) weight = Add(weight, ElementsIn(items, 2));
  if (CopiesElements(name)) {
    weight = Add(weight, ElementsIn(items, 2));
    if (IsOneOf(kStrided, RebuildKind(name))) weight = Add(weight, *elements);
  }
  Spend(weight);
  auto made = std::make_shared<ObjectValue>();
  made->length = weight;
  made->elements = elements;
  return made;
}

ObjectPtr ObjectCosts::MakeBytes(const std::string& name, const ObjectItems& items) {
  const bool encodes = items.size() == 2 && items[0]->text && IsLatin1(*items[1]);
  const bool copies =
      name == kByteArray && (items.empty() || (items.size() == 1 && items[0]->is_bytes));
  if (!encodes && !copies)
    Fail("its pickle makes bytes by " + name + ", not from bytes that it holds");
  auto made = std::make_shared<ObjectValue>();
  made->length = items.empty() ? 0 : items[0]->length;
  made->is_bytes = true;
  Spend(made->length);
  return made;
}

// (function, type, arguments, state)
ObjectPtr ObjectCosts::RebuildFromType(const ObjectItems& items, int depth) {
  if (items.size() < 4 || depth == kMaxNestedCalls)
    Fail("its pickle calls " + std::string(kRebuildFromType) + " as torch does not");
  ObjectPtr made = Call(*items[0], *items[2], depth + 1);
  const ObjectValue& state = *items[3];
  SetState(state);
  // The state may hold other data for a tensor.
  if (made->elements && state.length > 0) made->elements = kHugeObject;
  return made;
}

// How many elements the tensor has that a call makes; nothing if it makes none.
std::optional<uint64_t> ObjectCosts::RebuiltElements(const std::string& name,
                                                     const ObjectItems& items) const {
  const std::string_view kind = RebuildKind(name);
  if (IsOneOf(kStrided, kind)) return StridedElements(items);
  if (IsOneOf(kParameters, kind)) {
    if (items.empty()) Fail("its pickle calls " + name + " without arguments");
    return items[0]->elements;
  }
  return name.starts_with(kRebuild) ? std::optional(kHugeObject) : std::nullopt;
}

uint64_t ObjectCosts::StridedElements(const ObjectItems& items) const {
  static const ObjectItems kNone;
  constexpr char kNoShape[] = "its pickle makes a tensor of a shape that none has";
  if (items.size() < 4) Fail(kNoShape);
  const ObjectItems& sizes = items[2]->items ? *items[2]->items : kNone;
  const ObjectItems& strides = items[3]->items ? *items[3]->items : kNone;
  if (sizes.size() != strides.size()) Fail(kNoShape);
  constexpr Wide kFar = Wide{1} << 100;  // beyond every storage; sums of these do not overflow
  Wide elements = 1;
  Wide last = items[1]->number.value_or(0);  // where in the storage the last element is
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (!IsSize(*sizes[i]) || !IsSize(*strides[i])) Fail(kNoShape);
    const Wide size = *sizes[i]->number;
    elements = std::min(elements * size, Wide{kHugeObject});
    last = std::min(last + (size - 1) * *strides[i]->number, kFar);
  }
  const std::optional<uint64_t>& stored = items[0]->elements;
  if (elements > 0 && (!stored || last >= static_cast<Wide>(*stored)))
    Fail("its pickle makes a tensor larger than its storage");
  return static_cast<uint64_t>(elements);
}

}  // namespace hsdp_ckpt::pickle
