#include "simgpu/aten/fallback.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/native/Resize.h>
#include <c10/core/DeviceGuard.h>

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <utility>

#include "simgpu/aten/device_view.h"

namespace simgpu::aten {

using c10::IValue;
using torch::jit::Stack;
using Tensors = std::vector<at::Tensor>;

namespace {

Backend& Stored() {
  static Backend backend{};
  return backend;
}

struct Used {
  std::mutex mutex;
  std::set<std::string> names;
};
Used& TheUsed() {
  static auto& used = *new Used;
  return used;
}

// ---- what a call is
// ------------------------------------------------------------------------------

struct Signature {
  std::string name;
  std::vector<bool> writes;                    // by argument
  std::vector<std::optional<size_t>> returns;  // by result: the argument that it is
  bool makes_tensors = false;
  bool makes_others = false;  // numbers, which the host gets at once
  bool has_out = false;       // tensors that it writes, and may resize
  bool is_random = false;
  bool depends_on_data = false;
};

std::optional<size_t> ArgumentOf(const c10::FunctionSchema& schema, const c10::AliasInfo& result) {
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    if (alias != nullptr && alias->isWrite() && alias->beforeSets() == result.beforeSets()) {
      return i;
    }
  }
  return std::nullopt;
}

Signature SignatureOf(const c10::OperatorHandle& op) {
  const auto& schema = op.schema();
  Signature s;
  s.name = toString(op.operator_name());
  for (const auto& argument : schema.arguments()) {
    const bool writes = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    s.writes.push_back(writes);
    s.has_out = s.has_out || (writes && argument.is_out());
    const std::string type = argument.type()->str();
    s.is_random = s.is_random || type.find("Generator") != std::string::npos;
  }
  for (const auto& result : schema.returns()) {
    s.returns.emplace_back();
    if (result.alias_info() != nullptr) {
      s.returns.back() = ArgumentOf(schema, *result.alias_info());
      TORCH_CHECK(s.returns.back(), "simgpu: ", s.name, " makes a view and has no kernel here");
      continue;
    }
    const std::string type = result.type()->str();
    (type == "Tensor" || type == "Tensor[]" ? s.makes_tensors : s.makes_others) = true;
  }
  s.is_random = s.is_random || op.hasTag(at::Tag::nondeterministic_seeded);
  s.depends_on_data =
      op.hasTag(at::Tag::data_dependent_output) || op.hasTag(at::Tag::dynamic_output_shape);
  return s;
}

// ---- its arguments, for the CPU
// ------------------------------------------------------------------

template <typename Change>
at::Tensor Changed(const at::Tensor& tensor, const Change& change) {
  return IsOnDevice(tensor) ? change(tensor) : tensor;
}

/// A seed for the next draw of a generator of the device's, which moves on.
uint64_t NextSeed(at::Generator& generator) {
  const std::lock_guard lock(generator.mutex());
  const uint64_t offset = generator.get_offset();
  generator.set_offset(offset + 4);
  return generator.current_seed() * 0x9E3779B9 + offset;
}

at::Generator OnCpu(at::Generator generator) {
  if (!generator.defined() || generator.device().is_cpu()) return generator;
  return at::make_generator<at::CPUGeneratorImpl>(NextSeed(generator));
}

/// While it lives the CPU's own generator draws what a device's would; then it is as it was.
class DrawsOfDevice {
 public:
  explicit DrawsOfDevice(c10::Device device) {
    if (TheBackend().default_generator == nullptr) return;
    at::Generator on_device = TheBackend().default_generator(device);
    before_ = cpu_.get_state();
    cpu_.set_current_seed(NextSeed(on_device));
  }
  ~DrawsOfDevice() {
    if (before_.defined()) cpu_.set_state(before_);
  }
  DrawsOfDevice(const DrawsOfDevice&) = delete;
  DrawsOfDevice& operator=(const DrawsOfDevice&) = delete;

 private:
  at::Generator cpu_ = at::detail::getDefaultCPUGenerator();
  at::Tensor before_;
};

/// An argument with each tensor of the device's changed; the device itself is the CPU.
template <typename Change>
IValue ForCpu(const IValue& value, const Change& change) {
  if (value.isTensor()) return Changed(value.toTensor(), change);
  if (value.isTensorList()) {
    c10::List<at::Tensor> out;
    for (const at::Tensor& t : value.toTensorVector()) out.push_back(Changed(t, change));
    return out;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> out;
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector()) {
      out.push_back(t ? std::optional(Changed(*t, change)) : std::nullopt);
    }
    return out;
  }
  if (value.isDevice()) return at::Device(at::kCPU);
  if (value.isGenerator()) return OnCpu(value.toGenerator());
  return value;
}

template <typename Visit>
void ForEachTensor(const IValue& value, const Visit& visit) {
  if (value.isTensor() && value.toTensor().defined()) visit(value.toTensor());
  if (value.isTensorList()) {
    for (const at::Tensor& t : value.toTensorVector()) visit(t);
  }
  if (value.isOptionalTensorList()) {
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector()) {
      if (t && t->defined()) visit(*t);
    }
  }
}

Stack CallOnCpu(const c10::OperatorHandle& op, Stack arguments) {
  const BelowAll below;
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &arguments);
  return arguments;
}

/// The device of the first tensor, or the one that is named; the current one if none is.
c10::Device DeviceOf(const Stack& arguments, bool& has_tensors) {
  std::optional<c10::Device> device;
  for (const IValue& value : arguments) {
    ForEachTensor(value, [&](const at::Tensor& t) {
      if (!device && IsOnDevice(t)) device = t.device();
    });
  }
  has_tensors = device.has_value();
  for (const IValue& value : arguments) {
    if (!device && value.isDevice()) device = value.toDevice();
  }
  const c10::impl::VirtualGuardImpl guard(TheBackend().type);
  return device && device->has_index() ? *device : guard.getDevice();
}

at::Tensor LikeOnDevice(const at::Tensor& cpu, c10::Device device) {
  const auto options = cpu.options().device(device).pinned_memory(false);
  return at::empty_strided(cpu.sizes(), cpu.strides(), options);
}

void ResizeAs(const at::Tensor& out, const at::Tensor& cpu) {
  if (out.sizes() == cpu.sizes()) return;
  at::native::resize_output(out, cpu.sizes());
  if (out.strides() != cpu.strides()) {
    out.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides());
  }
}

// ---- at once
// -------------------------------------------------------------------------------------

IValue OnDevice(const IValue& made, c10::Device device, int stream) {
  const auto upload = [&](const at::Tensor& cpu) {
    if (!cpu.defined()) return at::Tensor();
    at::Tensor to = LikeOnDevice(cpu, device);
    Engine::Get().SynchronizeStream(stream);  // the allocator's own writes come first
    const BelowAll below;
    DeviceView(to).OnCpu().copy_(cpu);
    return to;
  };
  if (made.isTensor()) return upload(made.toTensor());
  if (!made.isTensorList()) return made;
  c10::List<at::Tensor> out;
  for (const at::Tensor& t : made.toTensorVector()) out.push_back(upload(t));
  return out;
}

void RunNow(const c10::OperatorHandle& op, const Signature& signature, const Stack& arguments,
            c10::Device device, int stream, Stack* results) {
  if (signature.depends_on_data || signature.makes_others) TheBackend().about_to_wait();
  Engine::Get().SynchronizeStream(stream);
  Stack inputs;
  std::vector<std::pair<at::Tensor, at::Tensor>> outs;  // the device's, the CPU's
  for (size_t i = 0; i < arguments.size(); ++i) {
    inputs.push_back(ForCpu(arguments[i], [&](const at::Tensor& t) {
      if (!signature.writes[i] || !signature.has_out) return DeviceView(t).OnCpu();
      outs.emplace_back(t, at::empty(t.sizes(), t.options().device(at::kCPU)));
      return outs.back().second;
    }));
  }
  std::optional<DrawsOfDevice> draws;
  if (signature.is_random) draws.emplace(device);
  const Stack made = CallOnCpu(op, std::move(inputs));
  for (const auto& [out, cpu] : outs) {
    ResizeAs(out, cpu);
    const BelowAll below;
    DeviceView(out).OnCpu().copy_(cpu);
  }
  for (size_t r = 0; r < made.size(); ++r) {
    const std::optional<size_t> argument = signature.returns[r];
    results->push_back(argument ? arguments[*argument] : OnDevice(made[r], device, stream));
  }
}

// ---- later
// ---------------------------------------------------------------------------------------

/// What the CPU's kernel makes of zeros of the same sizes; `out` tensors get their sizes from it.
Stack ShapesOf(const c10::OperatorHandle& op, const Signature& signature, const Stack& arguments) {
  if (!signature.makes_tensors && !signature.has_out) return {};
  Stack inputs;
  std::vector<std::pair<at::Tensor, at::Tensor>> outs;
  for (size_t i = 0; i < arguments.size(); ++i) {
    inputs.push_back(ForCpu(arguments[i], [&](const at::Tensor& t) {
      const auto options = t.options().device(at::kCPU).pinned_memory(false);
      const bool is_out = signature.writes[i] && signature.has_out;
      const BelowAll below;
      at::Tensor cpu = is_out && t.numel() == 0
                           ? at::empty({0}, options)
                           : at::empty_strided(t.sizes(), t.strides(), options).zero_();
      if (is_out) outs.emplace_back(t, cpu);
      if (t.is_conj()) cpu._set_conj(true);
      if (t.is_neg()) cpu._set_neg(true);
      return cpu;
    }));
  }
  Stack shapes = CallOnCpu(op, std::move(inputs));
  for (const auto& [out, cpu] : outs) ResizeAs(out, cpu);
  return shapes;
}

/// An argument as the kernel gets it: views of the device's tensors, the host's as they are now.
std::function<IValue()> Deferred(const IValue& value, bool writes, Operation& kernel) {
  auto views = std::make_shared<std::vector<DeviceView>>();
  ForEachTensor(value, [&](const at::Tensor& t) {
    if (!IsOnDevice(t)) return;
    views->emplace_back(t);
    kernel.accesses.push_back(views->back().access(false));
    if (writes) kernel.accesses.push_back(views->back().access(true));
  });
  IValue kept = value;
  if (value.isTensor() && value.toTensor().defined() && !IsOnDevice(value.toTensor())) {
    const BelowAll below;
    kept = value.toTensor().clone();
  } else if (!views->empty()) {
    // The tensors' own memory is not held: only which of a list's are the device's is.
    kept = ForCpu(value, [](const at::Tensor&) { return at::Tensor(); });
  }
  auto is_ours = std::make_shared<std::vector<bool>>();
  if (value.isTensorList()) {
    for (const at::Tensor& t : value.toTensorVector()) is_ours->push_back(IsOnDevice(t));
  } else if (value.isOptionalTensorList()) {
    for (const auto& t : value.toOptionalTensorVector()) {
      is_ours->push_back(t && IsOnDevice(*t));
    }
  }
  return [views, kept, is_ours]() -> IValue {
    if (views->empty()) return ForCpu(kept, [](const at::Tensor& t) { return t; });
    if (kept.isTensorList()) {
      c10::List<at::Tensor> out;
      const Tensors host = kept.toTensorVector();
      for (size_t i = 0, next = 0; i < host.size(); ++i) {
        out.push_back((*is_ours)[i] ? (*views)[next++].OnCpu() : host[i]);
      }
      return out;
    }
    if (kept.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> out;
      const auto host = kept.toOptionalTensorVector();
      for (size_t i = 0, next = 0; i < host.size(); ++i) {
        out.push_back((*is_ours)[i] ? std::optional((*views)[next++].OnCpu()) : host[i]);
      }
      return out;
    }
    return views->front().OnCpu();
  };
}

using Views = std::vector<DeviceView>;

/// New tensors of the device's in these shapes, which the kernel will write.
IValue MakeResult(const IValue& shape, c10::Device device, Operation& kernel, Views& views) {
  const auto make = [&](const at::Tensor& like) {
    if (!like.defined()) {
      views.emplace_back();
      return at::Tensor();
    }
    at::Tensor made = LikeOnDevice(like, device);
    views.emplace_back(made);
    kernel.accesses.push_back(views.back().access(true));
    return made;
  };
  if (!shape.isTensorList()) return make(shape.toTensor());
  c10::List<at::Tensor> list;
  for (const at::Tensor& t : shape.toTensorVector()) list.push_back(make(t));
  return list;
}

void Store(const IValue& made, const Views& views) {
  const Tensors values = made.isTensorList() ? made.toTensorVector() : Tensors{made.toTensor()};
  for (size_t i = 0; i < views.size(); ++i) {
    if (views[i].defined() && values[i].defined()) views[i].OnCpu().copy_(values[i]);
  }
}

void RunLater(const c10::OperatorHandle& op, const Signature& signature, const Stack& arguments,
              c10::Device device, int stream, Stack* results) {
  const Stack shapes = ShapesOf(op, signature, arguments);
  Operation kernel;
  kernel.name = signature.name;
  std::vector<std::function<IValue()>> inputs;
  for (size_t i = 0; i < arguments.size(); ++i) {
    inputs.push_back(Deferred(arguments[i], signature.writes[i], kernel));
  }
  std::vector<Views> outputs;
  for (size_t r = 0; r < signature.returns.size(); ++r) {
    outputs.emplace_back();
    const std::optional<size_t> argument = signature.returns[r];
    results->push_back(argument ? arguments[*argument]
                                : MakeResult(shapes.at(r), device, kernel, outputs.back()));
  }
  kernel.run = [op, inputs = std::move(inputs), outputs = std::move(outputs)] {
    const BelowAll below;
    Stack values;
    for (const auto& input : inputs) values.push_back(input());
    const Stack made = CallOnCpu(op, std::move(values));
    for (size_t r = 0; r < outputs.size(); ++r) {
      if (!outputs[r].empty()) Store(made[r], outputs[r]);
    }
  };
  Engine::Get().Issue(stream, std::move(kernel));
}

}  // namespace

void SetBackend(const Backend& backend) { Stored() = backend; }
const Backend& TheBackend() { return Stored(); }

bool IsOnDevice(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == TheBackend().type;
}

void Fallback(const c10::OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  const Stack arguments(stack->end() - static_cast<std::ptrdiff_t>(count), stack->end());
  torch::jit::drop(*stack, count);
  const Signature signature = SignatureOf(op);
  {
    const std::lock_guard lock(TheUsed().mutex);
    TheUsed().names.insert(signature.name);
  }
  bool has_tensors = false;
  const c10::Device device = DeviceOf(arguments, has_tensors);
  const c10::DeviceGuard guard(device);
  const int stream = TheBackend().current_stream();
  const bool now = signature.is_random || signature.depends_on_data || signature.makes_others ||
                   !has_tensors;  // a factory: nothing to wait for, and the host makes the values
  (now ? RunNow : RunLater)(op, signature, arguments, device, stream, stack);
}

std::vector<std::string> UsedOperators() {
  const std::lock_guard lock(TheUsed().mutex);
  return {TheUsed().names.begin(), TheUsed().names.end()};
}

}  // namespace simgpu::aten
