#pragma once

// One run of BatchedCopy on one CPU thread: CastRun<Src, Dst, kAccumulate>(src, dst, n, scale,
// stream), CopyRun.
//
// `stream` writes past the caches: worth it where the whole batch is larger than they are, since a
// line is then not read before it is overwritten.
//
// The library is built for the oldest processor of its architecture, which on x86-64 has no
// instruction for float16 and half of the vector width, so there a second version is compiled for
// AVX2 and F16C and chosen at run time. The tail of a run goes through the same vector code as its
// body: an element's result does not depend on where it lies.

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <iterator>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__)
#define HSDP_CKPT_CAST_AVX2 1
#include <immintrin.h>
#endif

namespace hsdp_ckpt::kernels {

/// What a pair of dtypes computes in.
template <typename Src, typename Dst>
using ComputeType =
    std::conditional_t<std::is_same_v<Src, double> || std::is_same_v<Dst, double>, double, float>;

/// One rounding, or as ATen's casts have it, one to float first where float64 goes to 16 bits.
template <typename To, typename From>
inline To Narrow(From x) {
  if constexpr (std::is_same_v<To, double> || std::is_same_v<To, float>) {
    return static_cast<To>(x);
  } else {
    return static_cast<To>(static_cast<float>(x));
  }
}

template <typename Src, typename Dst, bool kAccumulate>
void CastRunPortable(const Src* __restrict src, Dst* __restrict dst, int64_t n, double scale) {
  using C = ComputeType<Src, Dst>;
  const C s = static_cast<C>(scale);
  for (int64_t i = 0; i < n; ++i) {
    C x = static_cast<C>(src[i]) * s;
    if constexpr (kAccumulate) x += static_cast<C>(dst[i]);
    dst[i] = Narrow<Dst>(x);
  }
}

#ifdef HSDP_CKPT_CAST_AVX2
// The attribute instead of compiler flags for a whole file: c10's inline functions compiled with
// AVX2 in one file could be the ones that the linker keeps for all. No FMA: the product is rounded,
// as ATen rounds it.
#define HSDP_CKPT_AVX2 __attribute__((target("avx2,f16c"), always_inline)) inline

struct F8 {
  __m256 v;
};
struct D8 {
  __m256d lo, hi;
};

HSDP_CKPT_AVX2 void Load(const float* p, F8& x) { x.v = _mm256_loadu_ps(p); }
HSDP_CKPT_AVX2 void Load(const c10::Half* p, F8& x) {
  x.v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
HSDP_CKPT_AVX2 void Load(const c10::BFloat16* p, F8& x) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  x.v = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
HSDP_CKPT_AVX2 void Load(const double* p, D8& x) {
  x.lo = _mm256_loadu_pd(p);
  x.hi = _mm256_loadu_pd(p + 4);
}
template <typename T>
HSDP_CKPT_AVX2 void Load(const T* p, D8& x) {
  F8 f;
  Load(p, f);
  x.lo = _mm256_cvtps_pd(_mm256_castps256_ps128(f.v));
  x.hi = _mm256_cvtps_pd(_mm256_extractf128_ps(f.v, 1));
}

/// Sixteen elements as they lie in memory.
template <typename T>
struct Packed {
  __m256i v[sizeof(T) / 2];
};

/// bfloat16 in the low half of every lane; of a NaN anything.
HSDP_CKPT_AVX2 __m256i RoundToBFloat16(__m256 x) {
  // Half of the last place kept, less one, plus the last bit kept: to nearest, ties to even.
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd),
                           16);
}
/// The addition could carry a NaN over into zero.
HSDP_CKPT_AVX2 __m256i KeepNaN(__m256i rounded, __m256 x) {
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
}

HSDP_CKPT_AVX2 void Pack(const F8& x, const F8& y, Packed<float>& out) {
  out = {{_mm256_castps_si256(x.v), _mm256_castps_si256(y.v)}};
}
HSDP_CKPT_AVX2 void Pack(const F8& x, const F8& y, Packed<c10::Half>& out) {
  out = {{_mm256_set_m128i(_mm256_cvtps_ph(y.v, _MM_FROUND_TO_NEAREST_INT),
                           _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT))}};
}
/// Bound by the number of instructions where the data is in the caches: NaNs are rare, so one
/// comparison for all sixteen.
HSDP_CKPT_AVX2 void Pack(const F8& x, const F8& y, Packed<c10::BFloat16>& out) {
  __m256i low = RoundToBFloat16(x.v), high = RoundToBFloat16(y.v);
  if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(x.v, y.v, _CMP_UNORD_Q)) != 0, 0)) {
    low = KeepNaN(low, x.v);
    high = KeepNaN(high, y.v);
  }
  // packus works within halves of 128 bits; its quarters are put in order.
  out = {{_mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), _MM_SHUFFLE(3, 1, 2, 0))}};
}
HSDP_CKPT_AVX2 void Pack(const D8& x, const D8& y, Packed<double>& out) {
  out = {{_mm256_castpd_si256(x.lo), _mm256_castpd_si256(x.hi), _mm256_castpd_si256(y.lo),
          _mm256_castpd_si256(y.hi)}};
}
template <typename T>
HSDP_CKPT_AVX2 void Pack(const D8& x, const D8& y, Packed<T>& out) {
  Pack(F8{_mm256_set_m128(_mm256_cvtpd_ps(x.hi), _mm256_cvtpd_ps(x.lo))},
       F8{_mm256_set_m128(_mm256_cvtpd_ps(y.hi), _mm256_cvtpd_ps(y.lo))}, out);
}

HSDP_CKPT_AVX2 void Scale(F8& x, float s) { x.v = _mm256_mul_ps(x.v, _mm256_set1_ps(s)); }
HSDP_CKPT_AVX2 void Scale(D8& x, double s) {
  x.lo = _mm256_mul_pd(x.lo, _mm256_set1_pd(s));
  x.hi = _mm256_mul_pd(x.hi, _mm256_set1_pd(s));
}
HSDP_CKPT_AVX2 void Add(F8& x, const F8& y) { x.v = _mm256_add_ps(x.v, y.v); }
HSDP_CKPT_AVX2 void Add(D8& x, const D8& y) {
  x.lo = _mm256_add_pd(x.lo, y.lo);
  x.hi = _mm256_add_pd(x.hi, y.hi);
}

template <typename Src, typename Dst, bool kScale, bool kAccumulate, typename C>
HSDP_CKPT_AVX2 void CastSixteen(const Src* src, const Dst* dst, C scale, Packed<Dst>& out) {
  std::conditional_t<std::is_same_v<C, double>, D8, F8> x, y, sum;
  Load(src, x);
  Load(src + 8, y);
  if constexpr (kScale) {
    Scale(x, scale);
    Scale(y, scale);
  }
  if constexpr (kAccumulate) {
    Load(dst, sum);
    Add(x, sum);
    Load(dst + 8, sum);
    Add(y, sum);
  }
  Pack(x, y, out);
}

template <typename Src, typename Dst, bool kScale, bool kAccumulate>
__attribute__((target("avx2,f16c"))) void CastRunAvx2(const Src* src, Dst* dst, int64_t n,
                                                      double scale, bool stream) {
  using C = ComputeType<Src, Dst>;
  const C s = static_cast<C>(scale);
  const auto cast = [s](const Src* from, Dst* to)
                        __attribute__((target("avx2,f16c"), always_inline)) {
                          Packed<Dst> out;
                          CastSixteen<Src, Dst, kScale, kAccumulate>(from, to, s, out);
                          for (size_t v = 0; v < std::size(out.v); ++v)
                            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + v, out.v[v]);
                        };
  int64_t i = 0;
  if (!kAccumulate && stream && n >= 32) {
    // Sixteen that end behind the first whole vector; what is left goes the usual way.
    cast(src, dst);
    i = static_cast<int64_t>((32 - reinterpret_cast<uintptr_t>(dst) % 32) / sizeof(Dst));
    for (; i + 16 <= n; i += 16) {
      Packed<Dst> out;
      CastSixteen<Src, Dst, kScale, false>(src + i, dst + i, s, out);
      for (size_t v = 0; v < std::size(out.v); ++v)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i) + v, out.v[v]);
    }
    _mm_sfence();
  }
  for (; i + 16 <= n; i += 16) cast(src + i, dst + i);
  if (i == n) return;
  const auto left = static_cast<size_t>(n - i);
  alignas(32) unsigned char in[16 * sizeof(Src)] = {}, out[16 * sizeof(Dst)] = {};
  std::memcpy(in, src + i, left * sizeof(Src));
  if constexpr (kAccumulate) std::memcpy(out, dst + i, left * sizeof(Dst));
  cast(reinterpret_cast<const Src*>(in), reinterpret_cast<Dst*>(out));
  std::memcpy(static_cast<void*>(dst + i), out, left * sizeof(Dst));
}

__attribute__((target("avx2"))) inline void StreamBytes(const char* src, char* dst, int64_t bytes) {
  const auto head = static_cast<int64_t>((64 - reinterpret_cast<uintptr_t>(dst) % 64) % 64);
  std::memcpy(dst, src, static_cast<size_t>(head));
  int64_t i = head;
  for (; i + 64 <= bytes; i += 64) {
    const auto* from = reinterpret_cast<const __m256i*>(src + i);
    auto* to = reinterpret_cast<__m256i*>(dst + i);
    const __m256i low = _mm256_loadu_si256(from), high = _mm256_loadu_si256(from + 1);
    _mm256_stream_si256(to, low);
    _mm256_stream_si256(to + 1, high);
  }
  std::memcpy(dst + i, src + i, static_cast<size_t>(bytes - i));
  _mm_sfence();
}

/// Within the caches. memcpy takes `rep movsb` for more than a few KiB, which runs at a fifteenth
/// of its speed (Zen 4) where `dst` lies a few bytes behind `src` within their pages: so do the
/// pieces of parameters that don't divide evenly.
__attribute__((target("avx2"))) inline void CopyBytes(const char* src, char* dst, int64_t bytes) {
  const auto move = [](const char* from, char* to) __attribute__((target("avx2"), always_inline)) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  };
  // One vector that ends in the first whole one, then stores that never cross a line; the last
  // vector ends where all does.
  move(src, dst);
  int64_t i = 32 - static_cast<int64_t>(reinterpret_cast<uintptr_t>(dst) % 32);
  for (; i + 128 <= bytes; i += 128) {
    for (int64_t k = 0; k < 128; k += 32) move(src + i + k, dst + i + k);
  }
  for (; i + 32 <= bytes; i += 32) move(src + i, dst + i);
  move(src + bytes - 32, dst + bytes - 32);
}
#undef HSDP_CKPT_AVX2
#endif

inline bool HasAvx2() {
#ifdef HSDP_CKPT_CAST_AVX2
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  return has;
#else
  return false;
#endif
}

inline void CopyRun(const char* src, char* dst, int64_t bytes, [[maybe_unused]] bool stream) {
#ifdef HSDP_CKPT_CAST_AVX2
  // Not for short pieces: a fence each, and lines that two pieces share.
  if (stream && bytes >= 4096 && HasAvx2()) return StreamBytes(src, dst, bytes);
  if (bytes >= 512 && HasAvx2()) return CopyBytes(src, dst, bytes);
#endif
  std::memcpy(dst, src, static_cast<size_t>(bytes));
}

template <typename Src, typename Dst, bool kAccumulate>
void CastRun(const Src* src, Dst* dst, int64_t n, double scale, [[maybe_unused]] bool stream) {
#ifdef HSDP_CKPT_CAST_AVX2
  if (HasAvx2() && scale == 1.0)
    return CastRunAvx2<Src, Dst, false, kAccumulate>(src, dst, n, 1.0, stream && n >= 1024);
  if (HasAvx2())
    return CastRunAvx2<Src, Dst, true, kAccumulate>(src, dst, n, scale, stream && n >= 1024);
#endif
  CastRunPortable<Src, Dst, kAccumulate>(src, dst, n, scale);
}

/// Calls `fn` with a value of the C++ type of a dtype that BatchedCopy computes with.
template <typename Fn>
void WithType(c10::ScalarType type, const Fn& fn) {
  switch (type) {
    case c10::kFloat:
      return fn(float{});
    case c10::kDouble:
      return fn(double{});
    case c10::kBFloat16:
      return fn(c10::BFloat16{});
    case c10::kHalf:
      return fn(c10::Half{});
    default:
      TORCH_INTERNAL_ASSERT(false, "BatchedCopy does not compute with ", type);
  }
}

}  // namespace hsdp_ckpt::kernels
