#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace hsdp_ckpt::pickle {

/// Names of the installed torch that decide what a pickle's calls make. The caller fills them in
/// once; nothing here asks torch.
struct TorchNames {
  using Global = std::pair<std::string, std::string>;  ///< module, attribute

  std::unordered_map<std::string, std::string> renamed_modules;  ///< Python 2's name to Python 3's
  std::map<Global, Global> renamed_globals;
  /// Classes of tensors and storages, with their modules: called, they take memory by a number.
  std::unordered_set<std::string> tensor_classes;
  std::unordered_map<std::string, uint64_t> storage_item_sizes;  ///< "FloatStorage": 4 bytes
};

/// Bytes of an archive's entries by their names: "data/0".
using EntrySizes = std::unordered_map<std::string, uint64_t>;

struct ObjectValue;
/// Shared as in Python: a list grows wherever it is named.
using ObjectPtr = std::shared_ptr<ObjectValue>;
using ObjectItems = std::vector<ObjectPtr>;

/// What is known of a Python value: how large it is, and as much of it as decides what a call
/// makes.
struct ObjectValue {
  std::string global;  ///< a global's module and name; only together they say which
  std::optional<std::string_view> text;  ///< a view into the pickle
  std::optional<int64_t> number;         ///< saturated
  uint64_t length = 0;                   ///< characters, bytes, items
  bool is_bytes = false;
  std::optional<ObjectItems> items;  ///< a tuple's
  std::optional<uint64_t> elements;  ///< a tensor's or a storage's; kHugeObject: any number

  ObjectValue() = default;
  ObjectValue(const ObjectValue&) = delete;
  ObjectValue& operator=(const ObjectValue&) = delete;
  /// Without recursion: tuples may be nested as deep as the pickle is long.
  ~ObjectValue();
};

/// Sizes are counted up to here; no file has so many bytes.
inline constexpr uint64_t kHugeObject = uint64_t{1} << 62;

/// Adds up what an object's pickles make beyond the bytes that they hold, and knows what each call
/// that torch lets a pickle make costs. Everything throws CorruptionError once it is more than the
/// limit, and for arguments that no torch.save writes. Owns none of what the constructor is given;
/// one thread at a time.
class ObjectCosts {
 public:
  /// `what` begins messages. `limit`: bytes and items that the pickles may make in all. `entries`:
  /// the archive's; null: there is no archive, and storages count with the sizes that the pickles
  /// give them.
  ObjectCosts(const TorchNames& names, std::string what, uint64_t limit, const EntrySizes* entries);

  ObjectPtr Global(std::string_view module, std::string_view attribute) const;
  /// A storage from its persistent id: ("storage", class, key, location, elements).
  ObjectPtr Storage(const ObjectValue& id);
  ObjectPtr Call(const ObjectValue& function, const ObjectValue& arguments) {
    return Call(function, arguments, 0);
  }
  /// BUILD, or what `_rebuild_from_type_v2` does with a state: it may be copied.
  void SetState(const ObjectValue& state);

  [[noreturn]] void Fail(const std::string& problem) const;
  const std::string& what() const { return what_; }

 private:
  ObjectPtr Call(const ObjectValue& function, const ObjectValue& arguments, int depth);
  ObjectPtr MakeBytes(const std::string& name, const ObjectItems& items);
  ObjectPtr RebuildFromType(const ObjectItems& items, int depth);
  std::optional<uint64_t> RebuiltElements(const std::string& name, const ObjectItems& items) const;
  uint64_t StridedElements(const ObjectItems& items) const;
  uint64_t StorageBytes(const ObjectValue& kind, const ObjectValue& key,
                        const ObjectValue& elements) const;
  void Spend(uint64_t size);

  const TorchNames& names_;
  std::string what_;
  uint64_t limit_;
  const EntrySizes* entries_;
  std::unordered_map<std::string, uint64_t> storages_;  // bytes by key
};

}  // namespace hsdp_ckpt::pickle
