// The project's kernels, from their own source, as operations of the simulated GPU.
#include "simgpu/kernels/device_language.h"
// After it: what the device language means.
#include <cxxabi.h>

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels/batched_copy_device.h"
#include "simgpu/core/engine.h"
#include "simgpu/cuda/kernels.h"

namespace hsdp_ckpt::kernels {
namespace {

using simgpu::Access;
using simgpu::Engine;
using simgpu::KernelCode;
using simgpu::Launch;
using simgpu::Operation;

/// Bytes of an element on both sides, and whether what is there is added to.
struct Shape {
  size_t src, dst;
  bool accumulates;
};

std::vector<Access> AccessesOf(const std::vector<Entry>& entries, const Shape& shape) {
  std::vector<Access> out;
  for (const Entry& entry : entries) {
    const auto n = static_cast<size_t>(entry.numel);
    if (entry.src != nullptr) out.push_back(simgpu::Reads(entry.src, n * shape.src));
    if (shape.accumulates) out.push_back(simgpu::Reads(entry.dst, n * shape.dst));
    if (!shape.accumulates || entry.src != nullptr) {
      out.push_back(simgpu::Writes(entry.dst, n * shape.dst));
    }
  }
  return out;
}

/// The same entries where the device's hands reach them.
std::vector<Entry> InHands(std::vector<Entry> entries) {
  for (Entry& entry : entries) {
    if (entry.src != nullptr) entry.src = static_cast<char*>(Engine::Get().Hands(entry.src));
    entry.dst = static_cast<char*>(Engine::Get().Hands(entry.dst));
  }
  return entries;
}

/// A kernel whose table is an argument, which is read when it is launched.
template <typename Kernel>
Operation WithArgument(const Launch& launch, const Shape& shape, const Kernel& kernel) {
  const auto& table = *static_cast<const ArgTable*>(launch.arguments[0]);
  const std::vector<Entry> entries(table.entries, table.entries + table.count);
  const int64_t tiles = table.tiles;
  Operation operation;
  operation.accesses = AccessesOf(entries, shape);
  operation.run = [=] {
    auto reached = std::make_unique<ArgTable>();
    reached->count = static_cast<int>(entries.size());
    reached->tiles = tiles;
    std::ranges::copy(InHands(entries), reached->entries);
    RunGrid(launch.blocks, launch.threads, [&] { kernel(*reached); });
  };
  return operation;
}

/// A kernel whose table is in device memory, which is read when it runs.
template <typename Kernel>
Operation WithMemory(const Launch& launch, const Shape& shape, const Kernel& kernel) {
  const MemoryTable table = *static_cast<const MemoryTable*>(launch.arguments[0]);
  const auto read = [table] {
    const auto* first = static_cast<const Entry*>(Engine::Get().Hands(table.entries));
    return std::vector<Entry>(first, first + table.count);
  };
  Operation operation;
  operation.accesses = {
      simgpu::Reads(table.entries, sizeof(Entry) * static_cast<size_t>(table.count))};
  operation.late_accesses = [=] { return AccessesOf(read(), shape); };
  operation.run = [=] {
    const std::vector<Entry> entries = InHands(read());
    const MemoryTable reached{table.count, table.tiles, entries.data()};
    RunGrid(launch.blocks, launch.threads, [&] { kernel(reached); });
  };
  return operation;
}

/// `kernel`: takes either table. `name`: as the compiler gave it, which says which table it takes.
template <typename Kernel>
KernelCode CodeFor(const std::string& name, const std::string& title, const Shape& shape,
                   const Kernel& kernel) {
  const bool in_memory = name.find("MemoryTable") != std::string::npos;
  return [=](const Launch& launch) {
    Operation operation = in_memory ? WithMemory(launch, shape, kernel(launch))
                                    : WithArgument(launch, shape, kernel(launch));
    operation.name = title;
    return operation;
  };
}

KernelCode Copying(const std::string& name) {
  // Their elements are bytes.
  return CodeFor(name, "hsdp CopyKernel", {1, 1, false},
                 [](const Launch&) { return [](const auto& table) { CopyKernel(table); }; });
}

template <typename Src, typename Dst, bool kAccumulate>
KernelCode Casting(const std::string& name) {
  const Shape shape{sizeof(Src), sizeof(Dst), kAccumulate};
  return CodeFor(name, "hsdp CastKernel", shape, [](const Launch& launch) {
    using Scale = typename Cast<Src, Dst>::C;
    const Scale scale = *static_cast<const Scale*>(launch.arguments[1]);
    return [scale](const auto& table) {
      CastKernel<Src, Dst, kAccumulate, std::decay_t<decltype(table)>>(table, scale);
    };
  });
}

template <typename Fn>
KernelCode WithTypeNamed(const std::string& type, const Fn& fn) {
  if (type == "float") return fn(float{});
  if (type == "double") return fn(double{});
  if (type == "c10::BFloat16") return fn(c10::BFloat16{});
  if (type == "c10::Half") return fn(c10::Half{});
  throw std::invalid_argument("simgpu: no CastKernel of " + type);
}

/// The arguments of a template, as a demangled name has them.
std::vector<std::string> TemplateArguments(const std::string& name, size_t from) {
  std::vector<std::string> out;
  for (size_t end = name.find_first_of(",>", from); end != std::string::npos;
       end = name.find_first_of(",>", from)) {
    out.push_back(name.substr(from, end - from));
    from = end + 2;
    if (name[end] == '>') break;
  }
  return out;
}

KernelCode Find(const std::string& mangled) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> text(
      abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status), &std::free);
  if (!text) return nullptr;
  const std::string name = text.get();
  if (name.find("CopyKernel<") != std::string::npos) return Copying(name);
  const std::string cast = "CastKernel<";
  const size_t at = name.find(cast);
  if (at == std::string::npos) return nullptr;
  const std::vector<std::string> types = TemplateArguments(name, at + cast.size());
  return WithTypeNamed(types.at(0), [&](auto src) {
    return WithTypeNamed(types.at(1), [&](auto dst) {
      using Src = decltype(src);
      using Dst = decltype(dst);
      return types.at(2) == "true" ? Casting<Src, Dst, true>(name) : Casting<Src, Dst, false>(name);
    });
  });
}

}  // namespace
}  // namespace hsdp_ckpt::kernels

simgpu::KernelCode simgpu::FindKernel(const std::string& mangled) {
  return hsdp_ckpt::kernels::Find(mangled);
}
