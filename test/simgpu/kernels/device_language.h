#pragma once

// Stands in for the device language, for g++: what the kernels of csrc/kernels use of it. A block's
// threads run one after another, so that kernels with barriers or shared memory can't be built with
// it: they do not compile (__shared__, __syncthreads and warp functions are not here).
#include <cstdint>

#define __device__
#define __global__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
inline thread_local Index3 threadIdx, blockIdx, gridDim;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

// Rounded after each operation, never fused: built with -ffp-contract=off.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }

/// Launches a kernel: all threads of all blocks, one after another.
template <typename Kernel>
void RunGrid(unsigned blocks, unsigned threads, const Kernel& kernel) {
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel();
  }
}
