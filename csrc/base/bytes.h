#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"

namespace hsdp_ckpt::base {

inline std::span<const std::byte> AsBytes(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

inline std::string_view AsText(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

/// Appends little-endian numbers to a byte vector.
class ByteWriter {
 public:
  template <std::unsigned_integral T>
  void Put(T value) {
    for (size_t i = 0; i < sizeof(T); ++i)
      bytes_.push_back(static_cast<std::byte>(value >> (8 * i)));
  }
  void Put(std::span<const std::byte> bytes) {
    bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
  }
  void Put(std::string_view text) { Put(AsBytes(text)); }
  void PutZeros(size_t count) { bytes_.resize(bytes_.size() + count); }

  size_t size() const { return bytes_.size(); }
  const std::vector<std::byte>& bytes() const { return bytes_; }
  std::vector<std::byte> Take() { return std::move(bytes_); }

 private:
  std::vector<std::byte> bytes_;
};

/// Takes little-endian numbers from hostile bytes: every read is checked against the end first and
/// throws CorruptionError (naming `path` and `part`) beyond it. Does not own the bytes.
class ByteReader {
 public:
  ByteReader(std::span<const std::byte> bytes, std::string path, std::string part)
      : bytes_(bytes), path_(std::move(path)), part_(std::move(part)) {}

  template <std::unsigned_integral T>
  T Get() {
    const auto raw = Get(sizeof(T));
    T value = 0;
    for (size_t i = 0; i < sizeof(T); ++i)
      value = static_cast<T>(value | (static_cast<T>(raw[i]) << (8 * i)));
    return value;
  }
  std::span<const std::byte> Get(uint64_t size) {
    if (size > remaining()) Fail(std::to_string(size) + " more bytes", std::to_string(remaining()));
    const auto piece = bytes_.subspan(at_, size);
    at_ += size;
    return piece;
  }
  std::string_view GetText(uint64_t size) { return AsText(Get(size)); }

  size_t remaining() const { return bytes_.size() - at_; }
  size_t position() const { return at_; }

  [[noreturn]] void Fail(const std::string& expected, const std::string& got) const {
    throw CorruptionError(path_, part_, expected, got);
  }

 private:
  std::span<const std::byte> bytes_;
  size_t at_ = 0;
  std::string path_;
  std::string part_;
};

}  // namespace hsdp_ckpt::base
