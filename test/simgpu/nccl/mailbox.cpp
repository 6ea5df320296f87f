#include "simgpu/nccl/mailbox.h"

#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>

namespace simgpu {

Mailbox::Mailbox(const std::string& directory, const std::string& name)
    : prefix_(directory + "/simgpu_" + name + "_") {}

void Mailbox::Put(const std::string& message, const std::vector<char>& bytes) const {
  const std::string path = prefix_ + message;
  // Several threads may write the same message's draft only if the program is wrong about ranks.
  const std::string draft = path + ".draft" + std::to_string(getpid());
  std::ofstream file(draft, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  if (!file || std::rename(draft.c_str(), path.c_str()) != 0) {
    throw std::runtime_error("simgpu: " + path + " can't be written (no room in shared memory?)");
  }
}

bool Mailbox::Has(const std::string& message) const {
  return access((prefix_ + message).c_str(), F_OK) == 0;
}

std::vector<char> Mailbox::Read(const std::string& message) const {
  std::ifstream file(prefix_ + message, std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (!file) throw std::runtime_error("simgpu: " + prefix_ + message + " can't be read");
  return bytes;
}

void Mailbox::Remove(const std::string& message) const { unlink((prefix_ + message).c_str()); }

}  // namespace simgpu
