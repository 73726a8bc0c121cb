// A float vector `vf` of VF lanes for the ISA this file is compiled for: 16 (AVX-512), 8 (AVX2) or 8 plain
// floats that the compiler may vectorise. Everything lives in the ISA's namespace, so that the three builds
// of one kernel source never share an inline function.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common/dtype.h"

#ifndef MING_ISA
#error "compile *_cpu.cpp files through setup.py: MING_ISA names the instruction set"
#endif

#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__)
#define MING_ISA_AVX512 1
#define MING_ISA_AVX2 1
#elif defined(__AVX2__) && defined(__FMA__)
#define MING_ISA_AVX512 0
#define MING_ISA_AVX2 1
#else
#define MING_ISA_AVX512 0
#define MING_ISA_AVX2 0
#endif

#if MING_ISA_AVX2
#include <immintrin.h>
#endif

namespace ming {
namespace MING_ISA {

#if MING_ISA_AVX512

constexpr int VF = 16;
struct vf {
  __m512 v;
};
static inline vf vzero() {
  return {_mm512_setzero_ps()};
}
static inline vf vset(float x) {
  return {_mm512_set1_ps(x)};
}
static inline vf vload(const float* p) {
  return {_mm512_loadu_ps(p)};
}
static inline vf vload(const bf16* p) {
  __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
static inline void vstore(float* p, vf a) {
  _mm512_storeu_ps(p, a.v);
}
// In hardware: rounds to nearest even, subnormal results become zero.
static inline void vstore(bf16* p, vf a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
}
static inline vf vround_bf16(vf a) {
  __m256i h = (__m256i)_mm512_cvtneps_pbh(a.v);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
static inline vf operator+(vf a, vf b) {
  return {_mm512_add_ps(a.v, b.v)};
}
static inline vf operator-(vf a, vf b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
static inline vf operator*(vf a, vf b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
static inline vf operator/(vf a, vf b) {
  return {_mm512_div_ps(a.v, b.v)};
}
static inline vf vfma(vf a, vf b, vf c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}  // a*b + c
static inline vf vfnma(vf a, vf b, vf c) {
  return {_mm512_fnmadd_ps(a.v, b.v, c.v)};
}  // c - a*b
static inline vf vmax(vf a, vf b) {
  return {_mm512_max_ps(a.v, b.v)};
}
static inline vf vmin(vf a, vf b) {
  return {_mm512_min_ps(a.v, b.v)};
}
static inline vf vround(vf a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for integral n
static inline vf vscale2(vf a, vf n) {
  return {_mm512_scalef_ps(a.v, n.v)};
}
static inline float vsum(vf a) {
  return _mm512_reduce_add_ps(a.v);
}
static inline float vmaxall(vf a) {
  return _mm512_reduce_max_ps(a.v);
}

#elif MING_ISA_AVX2

constexpr int VF = 8;
struct vf {
  __m256 v;
};
static inline vf vzero() {
  return {_mm256_setzero_ps()};
}
static inline vf vset(float x) {
  return {_mm256_set1_ps(x)};
}
static inline vf vload(const float* p) {
  return {_mm256_loadu_ps(p)};
}
static inline vf vload(const bf16* p) {
  __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
static inline void vstore(float* p, vf a) {
  _mm256_storeu_ps(p, a.v);
}
static inline vf vround_bf16(vf a) {
  __m256i u = _mm256_castps_si256(a.v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan);
  return {_mm256_castsi256_ps(_mm256_and_si256(r, _mm256_set1_epi32(int(0xffff0000))))};
}
static inline void vstore(bf16* p, vf a) {
  __m256i r = _mm256_srli_epi32(_mm256_castps_si256(vround_bf16(a).v), 16);
  __m128i lo = _mm256_castsi256_si128(r), hi = _mm256_extracti128_si256(r, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(lo, hi));
}
static inline vf operator+(vf a, vf b) {
  return {_mm256_add_ps(a.v, b.v)};
}
static inline vf operator-(vf a, vf b) {
  return {_mm256_sub_ps(a.v, b.v)};
}
static inline vf operator*(vf a, vf b) {
  return {_mm256_mul_ps(a.v, b.v)};
}
static inline vf operator/(vf a, vf b) {
  return {_mm256_div_ps(a.v, b.v)};
}
static inline vf vfma(vf a, vf b, vf c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
static inline vf vfnma(vf a, vf b, vf c) {
  return {_mm256_fnmadd_ps(a.v, b.v, c.v)};
}
static inline vf vmax(vf a, vf b) {
  return {_mm256_max_ps(a.v, b.v)};
}
static inline vf vmin(vf a, vf b) {
  return {_mm256_min_ps(a.v, b.v)};
}
static inline vf vround(vf a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline vf vscale2(vf a, vf n) {
  // Two steps, so that results down to the subnormals and 2^128 are reached.
  __m256i i = _mm256_cvtps_epi32(n.v);
  __m256i half = _mm256_srai_epi32(i, 1), rest = _mm256_sub_epi32(i, half);
  const __m256i bias = _mm256_set1_epi32(127);
  __m256 s1 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  __m256 s2 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, s1), s2)};
}
static inline float vsum(vf a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float vmaxall(vf a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

#else

constexpr int VF = 8;
struct vf {
  float v[VF];
};
#define MING_LANES(expr)                        \
  vf r;                                         \
  for (int i = 0; i < VF; ++i) r.v[i] = (expr); \
  return r
static inline vf vset(float x) {
  MING_LANES(x);
}
static inline vf vzero() {
  return vset(0.0f);
}
static inline vf vload(const float* p) {
  MING_LANES(p[i]);
}
static inline vf vload(const bf16* p) {
  MING_LANES(to_float(p[i]));
}
static inline void vstore(float* p, vf a) {
  for (int i = 0; i < VF; ++i) p[i] = a.v[i];
}
static inline void vstore(bf16* p, vf a) {
  for (int i = 0; i < VF; ++i) p[i] = to_bf16(a.v[i]);
}
static inline vf vround_bf16(vf a) {
  MING_LANES(to_float(to_bf16(a.v[i])));
}
static inline vf operator+(vf a, vf b) {
  MING_LANES(a.v[i] + b.v[i]);
}
static inline vf operator-(vf a, vf b) {
  MING_LANES(a.v[i] - b.v[i]);
}
static inline vf operator*(vf a, vf b) {
  MING_LANES(a.v[i] * b.v[i]);
}
static inline vf operator/(vf a, vf b) {
  MING_LANES(a.v[i] / b.v[i]);
}
static inline vf vfma(vf a, vf b, vf c) {
  MING_LANES(a.v[i] * b.v[i] + c.v[i]);
}
static inline vf vfnma(vf a, vf b, vf c) {
  MING_LANES(c.v[i] - a.v[i] * b.v[i]);
}
static inline vf vmax(vf a, vf b) {
  MING_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]);
}
static inline vf vmin(vf a, vf b) {
  MING_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]);
}
static inline vf vround(vf a) {
  MING_LANES(std::nearbyint(a.v[i]));
}
static inline vf vscale2(vf a, vf n) {
  MING_LANES(n.v[i] == n.v[i] ? std::ldexp(a.v[i], int(n.v[i])) : n.v[i]);
}
static inline float vsum(vf a) {
  float s = 0.0f;
  for (int i = 0; i < VF; ++i) s += a.v[i];
  return s;
}
static inline float vmaxall(vf a) {
  float m = a.v[0];
  for (int i = 1; i < VF; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}
#undef MING_LANES

#endif

// e^x within 2 ulp; 0 below -104, +inf above 88.73, NaN stays NaN.
static inline vf vexp(vf x) {
  const vf lo = vset(-104.0f), hi = vset(89.0f);
  // The operand order makes NaN pass through max and min.
  vf c = vmax(lo, vmin(hi, x));
  vf n = vround(c * vset(1.44269504088896341f));
  vf r = vfnma(n, vset(0.693359375f), c);
  r = vfnma(n, vset(-2.12194440e-4f), r);
  vf q = vset(1.9875691500e-4f);
  q = vfma(q, r, vset(1.3981999507e-3f));
  q = vfma(q, r, vset(8.3334519073e-3f));
  q = vfma(q, r, vset(4.1665795894e-2f));
  q = vfma(q, r, vset(1.6666665459e-1f));
  q = vfma(q, r, vset(5.0000001201e-1f));
  return vscale2(vfma(q, r * r, r + vset(1.0f)), n);
}

static inline vf vsigmoid(vf x) {
  return vset(1.0f) / (vset(1.0f) + vexp(vzero() - x));
}
static inline vf vsilu(vf x) {
  return x * vsigmoid(x);
}

// a as a value of the storage type T would be read back
template <typename T>
static inline vf vrounded(vf a) {
  if constexpr (sizeof(T) == 2)
    return vround_bf16(a);
  else
    return a;
}

// The first n lanes of a vector that may end a row; with n >= VF all of it. Missing lanes read as `fill` and
// are not written.
template <typename T>
static inline vf vload_n(const T* p, int64_t n, float fill = 0.0f) {
  if (n >= VF) return vload(p);
  float tmp[VF];
  for (int i = 0; i < VF; ++i) tmp[i] = i < n ? to_float(p[i]) : fill;
  return vload(tmp);
}
template <typename T>
static inline void vstore_n(T* p, vf a, int64_t n) {
  if (n >= VF) return vstore(p, a);
  float tmp[VF];
  vstore(tmp, vrounded<T>(a));
  for (int i = 0; i < n; ++i) p[i] = from_float<T>(tmp[i]);
}

}  // namespace MING_ISA
}  // namespace ming
