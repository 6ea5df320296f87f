// Compiled in builds with tests only.
#include "base/left_out.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cctype>
#include <mutex>
#include <set>
#include <string_view>

namespace hsdp_ckpt::base {
namespace {

std::atomic<bool> is_asked{false};  // so that processes which leave out nothing pay nothing
std::mutex mutex;
std::string left_out;
std::set<std::string> seen;

// "void hsdp_ckpt::hsdp::Gather::Send()" is Send of Gather. Rooms' namespaces have small
// letters; those without a name have none that is worth telling.
std::string FunctionIn(std::string_view signature) {
  signature = signature.substr(0, signature.find('('));
  signature.remove_prefix(signature.rfind(' ') + 1);
  std::string name;
  for (size_t begin = 0; begin < signature.size();) {
    const size_t end = std::min(signature.find("::", begin), signature.size());
    const std::string_view part = signature.substr(begin, end - begin);
    if (std::isupper(static_cast<unsigned char>(part[0])) != 0) {
      name.append(name.empty() ? "" : "::").append(part);
    }
    begin = end + 2;
  }
  return name;
}

}  // namespace

void LeaveOut(const std::string& name) {
  const std::lock_guard lock(mutex);
  left_out = name;
  is_asked = !name.empty();
}

std::vector<std::string> OrderingsSeen() {
  const std::lock_guard lock(mutex);
  return {seen.begin(), seen.end()};
}

bool IsLeftOut(Ordering kind, const std::source_location& place) {
  if (!is_asked) return false;
  static constexpr std::array kWords{"enter", "within", "join", "uses", "hold"};
  std::string name = kWords.at(static_cast<size_t>(kind));
  name.append(" ").append(FunctionIn(place.function_name()));
  const std::lock_guard lock(mutex);
  seen.insert(name);
  return name == left_out;
}

}  // namespace hsdp_ckpt::base
