#include "simgpu/aten/device_view.h"

namespace simgpu::aten {

DeviceView::DeviceView(const at::Tensor& tensor)
    : data_(const_cast<void*>(tensor.const_data_ptr())),
      is_empty_(tensor.numel() == 0),
      sizes_(tensor.sizes().vec()),
      strides_(tensor.strides().vec()),
      dtype_(tensor.scalar_type()),
      conjugate_(tensor.is_conj()),
      negative_(tensor.is_neg()) {}

at::Tensor DeviceView::OnCpu() const {
  const auto options = at::TensorOptions(dtype_).device(at::kCPU);
  at::Tensor tensor = at::from_blob(Engine::Get().Hands(data_), sizes_, strides_, options);
  if (conjugate_) tensor._set_conj(true);
  if (negative_) tensor._set_neg(true);
  return tensor;
}

Access DeviceView::access(bool writes) const {
  if (is_empty_) return {0, 0, writes};
  int64_t elements = 1;  // from the first to the last, whatever lies between
  for (size_t d = 0; d < sizes_.size(); ++d) elements += (sizes_[d] - 1) * strides_[d];
  const size_t bytes = static_cast<size_t>(elements) * c10::elementSize(dtype_);
  return writes ? Writes(data_, bytes) : Reads(data_, bytes);
}

const at::ThreadLocalState& BelowAll::Clean() {
  // That of a thread in which nothing has been set, made when the extension is loaded.
  static const auto& state = *new at::ThreadLocalState;
  return state;
}

}  // namespace simgpu::aten
