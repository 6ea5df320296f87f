#include "kernels/batched_copy.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <vector>

#include "kernels/copied_bytes.h"

namespace hsdp_ckpt::kernels {
namespace {

void CheckSegments(std::span<const CopySegment> segments, size_t src_align, size_t dst_align) {
  for (size_t i = 0; i < segments.size(); ++i) {
    const auto& [src, dst, numel, runs, src_stride, dst_stride] = segments[i];
    TORCH_CHECK_VALUE(numel >= 0, "BatchedCopy: segment ", i, " has ", numel, " elements");
    TORCH_CHECK_VALUE(numel == 0 || dst != nullptr, "BatchedCopy: segment ", i,
                      " has no destination");
    // Off its natural alignment an address is undefined behaviour on the CPU and a fault on the
    // GPU.
    TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(src) % src_align == 0 &&
                          reinterpret_cast<uintptr_t>(dst) % dst_align == 0,
                      "BatchedCopy: segment ", i,
                      " lies at an address that is no multiple of its dtype's size");
  }
}

// Every run a segment of its own.
std::vector<CopySegment> RunByRun(std::span<const CopySegment> segments, size_t src_item,
                                  size_t dst_item) {
  std::vector<CopySegment> single;
  for (const CopySegment& segment : segments) {
    const auto src_step = segment.src_stride * static_cast<int64_t>(src_item);
    const auto dst_step = segment.dst_stride * static_cast<int64_t>(dst_item);
    for (int64_t run = 0; run < segment.runs; ++run) {
      const char* const src =
          segment.src == nullptr ? nullptr : static_cast<const char*>(segment.src) + run * src_step;
      single.push_back({src, static_cast<char*>(segment.dst) + run * dst_step, segment.numel});
    }
  }
  return single;
}

}  // namespace

void BatchedCopy(c10::Device device, std::span<const CopySegment> segments, c10::ScalarType src,
                 c10::ScalarType dst, double scale, bool accumulate) {
  TORCH_CHECK_VALUE(!device.is_meta(), "BatchedCopy: there is no memory on ", device);
  std::vector<CopySegment> single;
  if (std::any_of(segments.begin(), segments.end(),
                  [](const CopySegment& segment) { return segment.runs != 1; })) {
    single = RunByRun(segments, c10::elementSize(src), c10::elementSize(dst));
    segments = single;
  }
  CountCopy(segments, {c10::elementSize(src), c10::elementSize(dst), accumulate});
  const bool copies_bits = src == dst && scale == 1.0 && !accumulate;
  TORCH_CHECK_TYPE(copies_bits || (Computes(src) && Computes(dst)), "BatchedCopy: ", src, " to ",
                   dst, " with scale ", scale, accumulate ? ", accumulating," : "",
                   " is not supported: only float32, float64, bfloat16 and float16 are cast, "
                   "scaled or accumulated");
  if (copies_bits) {
    // Bits have no natural alignment: torch itself makes tensors of complex128 on 8-byte addresses.
    CheckSegments(segments, 1, 1);
    const auto item = static_cast<int64_t>(c10::elementSize(src));
    if (device.is_cpu()) return CopyCpu(segments, item);
#ifdef HSDP_CKPT_WITH_CUDA
    if (device.is_cuda()) return CopyCuda(device, segments, item);
#endif
    CopyAten(device, segments, item);
  } else {
    CheckSegments(segments, c10::elementSize(src), c10::elementSize(dst));
    if (device.is_cpu()) return CastCpu(segments, src, dst, scale, accumulate);
#ifdef HSDP_CKPT_WITH_CUDA
    if (device.is_cuda()) return CastCuda(device, segments, src, dst, scale, accumulate);
#endif
    CastAten(device, segments, src, dst, scale, accumulate);
  }
}

}  // namespace hsdp_ckpt::kernels
