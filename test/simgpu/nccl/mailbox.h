#pragma once

#include <string>
#include <vector>

namespace simgpu {

/// Messages between the processes of a job: files in a directory that they share, each of which
/// appears whole.
class Mailbox {
 public:
  /// `name`: of those who exchange messages here; no other has it.
  Mailbox(const std::string& directory, const std::string& name);

  void Put(const std::string& message, const std::vector<char>& bytes) const;
  bool Has(const std::string& message) const;
  std::vector<char> Read(const std::string& message) const;
  void Remove(const std::string& message) const;

 private:
  std::string prefix_;
};

}  // namespace simgpu
