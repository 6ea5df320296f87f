#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <span>
#include <vector>

namespace hsdp_ckpt::kernels {

/// One piece of a batched copy: `numel` elements from `src` to `dst`, as often as there are `runs`,
/// each run so many elements (of its side's dtype) behind the one before; src == nullptr writes
/// zeros.
struct CopySegment {
  const void* src;
  void* dst;
  int64_t numel;
  int64_t runs = 1;
  int64_t src_stride = 0, dst_stride = 0;
};

/// dst[i] = (accumulate ? dst[i] : 0) + cast(src[i]) * scale for every segment, in one fused pass.
///
/// This one primitive packs gradients into the input of a reduce-scatter (cast, pre-scaled, zeros
/// as padding), unpacks the result of a gather into full parameters, and accumulates. Every `src`
/// points to elements of dtype `src`, every `dst` to elements of dtype `dst`, both in the memory of
/// `device`; any length, any address that is a multiple of the element's size. Destinations must
/// not overlap each other or any source.
///
/// Numbers: the same dtype with scale 1 and without `accumulate` is a copy of the bits, for any
/// dtype. Else both dtypes are float32, float64, bfloat16 or float16; the product and the sum are
/// each rounded to float32 (float64 if either dtype is float64) and the result once more to `dst`,
/// to nearest even. float64 reaches the 16-bit dtypes by way of float32. All as `Tensor.to` and
/// `Tensor.add_` have it; a NaN stays a NaN, its payload is not kept. A piece of zeros that
/// accumulates leaves its destination as it is.
///
/// On a device the work is queued on the current stream of `device` and the memory must live until
/// it is done there (as for any kernel: memory of torch's allocator used on its own stream does);
/// the segments themselves are read before the call returns. On the CPU the call returns when the
/// bytes are there. CPU and CUDA have kernels of their own; on other devices, and on CUDA in a
/// build without CUDA, it is ATen's operators. Throws c10::Error on the meta device, other dtypes
/// or a bad segment.
void BatchedCopy(c10::Device device, std::span<const CopySegment> segments, c10::ScalarType src,
                 c10::ScalarType dst, double scale = 1.0, bool accumulate = false);

/// One piece of a batched sum: `numel` elements at every address of `srcs`, added in that order, go
/// to `dst`.
struct SumSegment {
  std::vector<const void*> srcs;  ///< none: zeros
  void* dst;                      ///< may be one of `srcs`
  int64_t numel;
};

/// dst[i] = (accumulate ? dst[i] : 0) + cast(srcs[0][i] + srcs[1][i] + ...) * scale for every
/// segment, in one pass over memory, on the CPU only: what is left of a reduction once the ranks
/// have exchanged their pieces.
///
/// Dtypes, addresses and errors as BatchedCopy's. Numbers: sums and product are each rounded to
/// float32 (float64 if either dtype is float64), whatever the dtypes, and the result once more to
/// `dst`.
void BatchedSum(std::span<const SumSegment> segments, c10::ScalarType src, c10::ScalarType dst,
                double scale = 1.0, bool accumulate = false);

/// Whether BatchedCopy computes with this dtype: float32, float64, bfloat16, float16.
constexpr bool Computes(c10::ScalarType type) {
  return type == c10::kFloat || type == c10::kDouble || type == c10::kBFloat16 ||
         type == c10::kHalf;
}

/// The two halves of BatchedCopy on each device, called with checked arguments and segments of one
/// run only. Copy* move bits; `item` is the bytes of an element. Cast* compute.
void CopyCpu(std::span<const CopySegment> segments, int64_t item);
void CastCpu(std::span<const CopySegment> segments, c10::ScalarType src, c10::ScalarType dst,
             double scale, bool accumulate);
void CopyCuda(c10::Device device, std::span<const CopySegment> segments, int64_t item);
void CastCuda(c10::Device device, std::span<const CopySegment> segments, c10::ScalarType src,
              c10::ScalarType dst, double scale, bool accumulate);
/// By ATen's operators, on any device: several launches where the others have one.
void CopyAten(c10::Device device, std::span<const CopySegment> segments, int64_t item);
void CastAten(c10::Device device, std::span<const CopySegment> segments, c10::ScalarType src,
              c10::ScalarType dst, double scale, bool accumulate);

}  // namespace hsdp_ckpt::kernels
