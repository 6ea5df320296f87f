#include <ATen/ATen.h>

#include "kernels/batched_copy.h"

namespace hsdp_ckpt::kernels {
namespace {

at::Tensor Around(const void* data, int64_t numel, c10::ScalarType type, c10::Device device) {
  return at::for_blob(const_cast<void*>(data), {numel})
      .target_device(device)
      .options(at::TensorOptions(type).device(device))
      .make_tensor();
}

}  // namespace

void CopyAten(c10::Device device, std::span<const CopySegment> segments, int64_t item) {
  std::vector<at::Tensor> to, from, zeros;
  for (const auto& [src, dst, numel, runs, src_stride, dst_stride] : segments) {
    if (numel == 0) continue;
    const at::Tensor target = Around(dst, numel * item, at::kByte, device);
    if (src == nullptr) {
      zeros.push_back(target);
      continue;
    }
    to.push_back(target);
    from.push_back(Around(src, numel * item, at::kByte, device));
  }
  if (!zeros.empty()) at::_foreach_zero_(zeros);
  if (!to.empty()) at::_foreach_copy_(to, from);
}

void CastAten(c10::Device device, std::span<const CopySegment> segments, c10::ScalarType src_type,
              c10::ScalarType dst_type, double scale, bool accumulate) {
  const bool wide = src_type == at::kDouble || dst_type == at::kDouble;
  const at::ScalarType computed = wide ? at::kDouble : at::kFloat;
  for (const auto& [src, dst, numel, runs, src_stride, dst_stride] : segments) {
    if (numel == 0) continue;
    const at::Tensor to = Around(dst, numel, dst_type, device);
    if (src == nullptr) {
      if (!accumulate) to.zero_();
      continue;
    }
    const at::Tensor from = Around(src, numel, src_type, device);
    if (scale == 1.0 && !accumulate) {
      to.copy_(from);
      continue;
    }
    at::Tensor sum = from.to(computed).mul(scale);  // not in place: `to` may give `from` itself
    if (accumulate) sum.add_(to.to(computed));
    to.copy_(sum);
  }
}

}  // namespace hsdp_ckpt::kernels
