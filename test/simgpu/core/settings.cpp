#include "simgpu/core/settings.h"

#include <charconv>
#include <cstdlib>
#include <stdexcept>
#include <string_view>

namespace simgpu {
namespace {

std::string_view Text(const char* name) {
  const char* text = std::getenv(name);
  return text == nullptr ? std::string_view{} : std::string_view{text};
}

[[noreturn]] void Refuse(const char* name, std::string_view text, const char* wanted) {
  throw std::invalid_argument(std::string(name) + "=" + std::string(text) + ": " + wanted);
}

template <typename T>
void Read(const char* name, T& value) {
  const std::string_view text = Text(name);
  if (text.empty()) return;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || value < 0) {
    Refuse(name, text, "not a number");
  }
}

void ReadMegabytes(const char* name, size_t& bytes) {
  size_t megabytes = bytes >> 20;
  Read(name, megabytes);
  if (!Text(name).empty()) bytes = megabytes << 20;
}

Pace PaceOf(uint64_t seed) {
  const std::string_view text = Text("SIMGPU_PACE");
  if (text == "lazy") return Pace::kLazy;
  if (text == "mixed") return Pace::kMixed;
  if (text == "eager") return Pace::kEager;
  if (!text.empty()) Refuse("SIMGPU_PACE", text, "lazy, mixed or eager");
  return seed % 3 == 0 ? Pace::kLazy : Pace::kMixed;
}

}  // namespace

Settings Settings::FromEnvironment() {
  Settings s;
  Read("SIMGPU_DEVICES", s.devices);
  ReadMegabytes("SIMGPU_DEVICE_MB", s.device_bytes);
  ReadMegabytes("SIMGPU_PINNED_MB", s.pinned_bytes);
  Read("SIMGPU_SEED", s.seed);
  s.pace = PaceOf(s.seed);
  Read("CUDA_DEVICE_MAX_CONNECTIONS", s.hardware_queues);
  if (s.hardware_queues < 1) s.hardware_queues = 1;
  Read("SIMGPU_IDLE_MS", s.idle_ms);
  Read("SIMGPU_DEADLOCK_S", s.deadlock_s);
  s.trace = Text("SIMGPU_TRACE") == "1";
  s.poison_frees = Text("SIMGPU_POISON_FREES") != "0";
  if (!Text("SIMGPU_DIR").empty()) s.directory = Text("SIMGPU_DIR");
  return s;
}

const Settings& Settings::Get() {
  static const Settings settings = FromEnvironment();
  return settings;
}

}  // namespace simgpu
