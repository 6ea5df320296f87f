#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

namespace hsdp_ckpt::base {

/// What went wrong with a checkpoint that is neither the operating system's word nor damage to its
/// bytes: two saves in one directory, a plan that does not fit, a name that leaves the directory.
/// Becomes Python's `CheckpointError`.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// An operating system call that failed. Becomes Python's `OSError` with `errno` and `filename`.
class IoError : public Error {
 public:
  /// `op` is the call as a user would look it up ("pwrite"), `offset` the byte offset in the file
  /// or -1.
  IoError(const std::string& op, const std::string& path, int64_t offset, int error_number);

  const std::string& path() const { return path_; }
  const std::string& op() const { return op_; }
  int64_t offset() const { return offset_; }
  int error_number() const { return error_number_; }

 private:
  std::string op_;
  std::string path_;
  int64_t offset_;
  int error_number_;
};

/// Bytes that are not what the format or a checksum says. Becomes Python's
/// `CorruptCheckpointError`.
class CorruptionError : public Error {
 public:
  /// `record` is the tensor's name, or the part of the file, for example "zip local header".
  CorruptionError(const std::string& path, const std::string& record, const std::string& expected,
                  const std::string& got);
  /// A whole sentence, for a problem that is more than one wrong value; there is no record then.
  CorruptionError(const std::string& path, const std::string& problem);

  const std::string& path() const { return path_; }
  const std::string& record() const { return record_; }

 private:
  std::string path_;
  std::string record_;
};

/// How messages write a CRC-32 ("CRC 0badcafe") and a shape or a place in one ("[3, 4]").
std::string CrcText(uint32_t crc);
std::string ShapeText(std::span<const int64_t> numbers);

}  // namespace hsdp_ckpt::base
