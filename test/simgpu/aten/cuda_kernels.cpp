// ATen's kernels for CUDA, stood in for by the CPU's (fallback.h). Everything else of torch's CUDA
// side is torch's own: allocators, streams, events, autograd, process groups.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/copy_native.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "simgpu/aten/device_view.h"
#include "simgpu/aten/fallback.h"
#include "simgpu/core/engine.h"
#include "simgpu/core/findings.h"
#include "simgpu/core/settings.h"

extern "C" int simgpu_stream(void* stream, int device);

namespace simgpu::aten {
namespace {

int CurrentStream() {
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  return simgpu_stream(stream.stream(), stream.device_index());
}

/// Within one device a kernel copies. Between devices, and to and from the host, torch's own code
/// does, which calls cudaMemcpyAsync.
at::Tensor& Copy(at::Tensor& self, const at::Tensor& src, bool non_blocking) {
  const bool fits = src.sizes() == self.sizes();
  const at::Tensor source = fits ? src : src.expand_as(self);
  if (!self.is_cuda() || !src.is_cuda() || self.device() != src.device()) {
    return at::native::copy_(self, self.is_cuda() ? source : src, non_blocking);
  }
  if (self.is_same(src)) return self;
  const c10::cuda::CUDAGuard guard(self.device());
  const DeviceView to(self), from(source);
  Operation copy;
  copy.kind = Kind::kCopy;
  copy.name = "aten::copy_";
  copy.accesses = {from.access(false), to.access(true)};
  copy.run = [to, from] {
    const BelowAll below;
    to.OnCpu().copy_(from.OnCpu());
  };
  Engine::Get().Issue(CurrentStream(), std::move(copy));
  return self;
}

/// Whether torch copies the lists by kernels that take many pairs each.
bool AreCopiedTogether(at::TensorList self, at::TensorList src) {
  for (size_t i = 0; i < self.size(); ++i) {
    const at::Tensor &to = self[i], &from = src[i];
    const bool is_here = to.device() == self[0].device() && from.device() == self[0].device();
    const bool is_alike = to.dtype() == self[0].dtype() && from.dtype() == src[0].dtype() &&
                          to.sizes() == from.sizes() && to.strides() == from.strides();
    if (!is_here || !is_alike || !to.is_non_overlapping_and_dense()) return false;
  }
  return !self.empty() && self[0].is_cuda();
}

/// What one launch takes is limited by the size of its arguments (MultiTensorApply.cuh); that a
/// launch also takes no more than some 80 MB is left out.
size_t PairsOfLaunch() { return at::detail::getCUDAHooks().versionCUDART() >= 13000 ? 448 : 64; }

void ForeachCopy(at::TensorList self, at::TensorList src, bool non_blocking) {
  if (!AreCopiedTogether(self, src)) {
    for (size_t i = 0; i < self.size(); ++i) at::Tensor(self[i]).copy_(src[i], non_blocking);
    return;
  }
  const c10::cuda::CUDAGuard guard(self[0].device());
  for (size_t first = 0; first < self.size(); first += PairsOfLaunch()) {
    const size_t last = std::min(self.size(), first + PairsOfLaunch());
    Operation kernel;
    kernel.name = "aten::_foreach_copy_";
    std::vector<std::pair<DeviceView, DeviceView>> pairs;
    for (size_t i = first; i < last; ++i) {
      const auto& [to, from] = pairs.emplace_back(DeviceView(self[i]), DeviceView(src[i]));
      kernel.accesses.push_back(from.access(false));
      kernel.accesses.push_back(to.access(true));
    }
    kernel.run = [pairs = std::move(pairs)] {
      const BelowAll below;
      for (const auto& [to, from] : pairs) to.OnCpu().copy_(from.OnCpu());
    };
    Engine::Get().Issue(CurrentStream(), std::move(kernel));
  }
}

// "mul.Tensor" of an operator of ATen's.
std::string NameInAten(const c10::OperatorName& name) {
  const std::string overload = name.overload_name.empty() ? "" : "." + name.overload_name;
  return name.name.rfind("aten::", 0) == 0 ? name.name.substr(6) + overload : "";
}

/// The one beside ATen's that torch's fully_shard has a kernel for.
bool IsFullyShards(const c10::OperatorName& name) {
  return name.name == "fsdp::chunk_cat_mixed_dtype";
}

/// The kernels that torch's fully_shard packs and unpacks with read a table of addresses, which is
/// uploaded first: of some words a tensor, and one for each block of threads (TensorShape.cu; the
/// kernel of its own takes the same pointers to such tables, as its symbol in torch's library
/// says).
bool ReadsTable(const c10::OperatorName& name) {
  static const std::set<std::string> of_aten = {"split_with_sizes_copy.out", "_chunk_cat",
                                                "_chunk_cat.out"};
  return IsFullyShards(name) || of_aten.contains(NameInAten(name));
}

void FallbackWithTable(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t count = op.schema().arguments().size();
  int64_t words = 0;
  std::optional<c10::Device> device;
  for (size_t i = stack->size() - count; i < stack->size(); ++i) {
    const c10::IValue& argument = (*stack)[i];
    if (!argument.isTensorList()) continue;
    for (const at::Tensor& tensor : argument.toTensorVector()) {
      device = tensor.device();
      words += 7 + static_cast<int64_t>(tensor.nbytes()) / 2048;
    }
  }
  if (device) {
    const c10::cuda::CUDAGuard guard(*device);
    at::empty({words}, at::TensorOptions(at::kLong).pinned_memory(true))
        .to(*device, /*non_blocking=*/true);
  }
  Fallback(op, stack);
}

/// What torch's own code does on the device's memory without touching an element, and what has a
/// kernel of its own here.
const std::set<std::string>& KeptOperators() {
  static const std::set<std::string> kept = {"empty.memory_format",
                                             "empty_strided",
                                             "as_strided",
                                             "view",
                                             "_reshape_alias",
                                             "unfold",
                                             "set_.source_Storage",
                                             "set_.source_Storage_storage_offset",
                                             "set_.source_Tensor",
                                             "set_",
                                             "set_.source_Tensor_storage_offset",
                                             "resize_",
                                             "record_stream",
                                             "_local_scalar_dense",
                                             "is_pinned",
                                             "_pin_memory",
                                             "copy_",
                                             "_foreach_copy_",
                                             "is_set_to",
                                             "_efficientzerotensor",
                                             "view_as_real",
                                             "view_as_complex",
                                             "view.dtype",
                                             "alias",
                                             "detach",
                                             "_fused_sdp_choice",
                                             "_fused_rms_norm_backward",
                                             "_thnn_fused_lstm_cell",
                                             "_thnn_fused_lstm_cell_backward_impl"};
  return kept;
}

bool IsReplaced(const c10::OperatorName& name) {
  if (IsFullyShards(name)) return true;
  const std::string in_aten = NameInAten(name);
  return !in_aten.empty() && !KeptOperators().contains(in_aten);
}

bool MakesView(const c10::FunctionSchema& schema) {
  for (const auto& result : schema.returns()) {
    if (result.alias_info() != nullptr && !result.alias_info()->isWrite()) return true;
  }
  return false;
}

void Register() {
  SetBackend({c10::DeviceType::CUDA, c10::DispatchKey::CUDA, &CurrentStream,
              [] { c10::cuda::warn_or_error_on_sync(); },
              [](c10::Device device) { return at::globalContext().defaultGenerator(device); }});
  auto& dispatcher = c10::Dispatcher::singleton();
  static auto& handles = *new std::vector<c10::RegistrationHandleRAII>;
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    if (!IsReplaced(name)) continue;
    const auto op = dispatcher.findSchema(name);
    if (!op || !op->hasKernelForDispatchKey(c10::DispatchKey::CUDA) || MakesView(op->schema())) {
      continue;
    }
    auto kernel = ReadsTable(name)
                      ? c10::KernelFunction::makeFromBoxedFunction<&FallbackWithTable>()
                      : c10::KernelFunction::makeFromBoxedFunction<&Fallback>();
    handles.push_back(dispatcher.registerImpl(name, c10::DispatchKey::CUDA, std::move(kernel),
                                              std::nullopt, nullptr, "simgpu"));
  }
  static auto& library =
      *new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  library.impl("copy_", torch::CppFunction::makeFromUnboxedFunction(&Copy));
  library.impl("_foreach_copy_", torch::CppFunction::makeFromUnboxedFunction(&ForeachCopy));
}

/// Memory that is given out, or taken back, holds what nobody wants to read, written by the stream
/// that it belongs to: whoever uses it on another stream without having said so (record_stream)
/// races with that. Taking back is stricter than the allocator: nobody is hurt before the block is
/// given out again, which may be never in a short run. `poison_frees` and SIMGPU_POISON_FREES=0
/// leave that out, for programs that rely on it.
std::atomic<bool>& PoisonsFrees() {
  static std::atomic<bool> poisons = Settings::Get().poison_frees;
  return poisons;
}

void Poison(const c10::CachingDeviceAllocator::TraceEntry& entry) {
  using Action = c10::CachingDeviceAllocator::TraceEntry;
  const bool gives = entry.action_ == Action::ALLOC;
  const bool takes = entry.action_ == Action::FREE_COMPLETED && PoisonsFrees();
  if ((!gives && !takes) || entry.size_ == 0) return;
  auto* block = reinterpret_cast<void*>(static_cast<uintptr_t>(entry.addr_));
  Engine& engine = Engine::Get();
  if (!engine.IsAllocated(block, entry.size_)) return;
  Operation poison;
  poison.kind = Kind::kPoison;
  poison.name = gives ? "an allocation" : "a free";
  poison.accesses = {Writes(block, entry.size_)};
  poison.run = [block, size = entry.size_, &engine] {
    std::memset(engine.Hands(block), 0xff, size);
  };
  const int stream = simgpu_stream(entry.stream_, engine.DeviceOf(block));
  engine.Issue(stream, std::move(poison), /*steps=*/false);  // the allocator's lock is held
}

}  // namespace
}  // namespace simgpu::aten

PYBIND11_MODULE(simgpu_aten, m) {
  using namespace simgpu;
  aten::Register();
  m.def("watch_allocator", [] {
    static const bool once = [] {
      c10::cuda::CUDACachingAllocator::attachAllocatorTraceTracker(&aten::Poison);
      return true;
    }();
    return once;
  });
  m.def("poison_frees", [](bool poisons) { aten::PoisonsFrees() = poisons; });
  m.def("findings", [] { return Findings::Get().count(); });
  m.def("findings_text", [] { return Findings::Get().text(); });
  m.def("clear_findings", [] { Findings::Get().Clear(); });
  m.def("counts", [] {
    const Counts counts = Engine::Get().counts();
    constexpr const char* kNames[] = {"kernels",       "copies",        "memsets",
                                      "collectives",   "event records", "event waits",
                                      "host functions"};  // the device's; poison is not
    std::map<std::string, uint64_t> out;
    for (size_t i = 0; i < std::size(kNames); ++i) out[kNames[i]] = counts.issued[i];
    out["host waits"] = counts.host_waits;
    out["queries"] = counts.queries;
    out["collectives on default streams"] = counts.collectives_on_default_streams;
    return out;
  });
  m.def("restart", [](uint64_t seed, const std::string& pace) {
    Engine::Get().Restart(seed, pace == "lazy"    ? Pace::kLazy
                                : pace == "eager" ? Pace::kEager
                                                  : Pace::kMixed);
  });
  m.def("used_operators", &aten::UsedOperators);
}
