// Inner kernels of attention: packing of keys and values, the small matrix product, softmax of a row.
//
// All operands are arrays of 4-byte units: a float, or (bfloat16 on AVX-512) a pair of bfloat16 that
// vdpbf16ps multiplies and adds at once. A product is C[m, n] += sum over u of A[m, u] * B[u, n], u in
// ascending order whatever the tile shape, so an element never depends on the rows computed next to it.
#pragma once

#include <limits>

#include "common/simd.h"
#include "common/transpose.h"

namespace ming {
namespace MING_ISA {
namespace {

constexpr int kBlock = 64;                // keys packed at a time
constexpr int kSpan = 512;                // keys that share one softmax maximum
constexpr int kScoreStride = kSpan + 16;  // of the score tile; not a power of two, to spread cache sets
constexpr int kTileRows = 128;            // query rows (queries x heads of the group) per tile

inline int padded(int dim) {
  return (dim + VF - 1) / VF * VF;
}

// 2^x within 2 ulp for x <= 0; exactly 1 at 0; NaN stays NaN.
inline vf vexp2(vf x) {
  x = vmax(vset(-160.0f), x);
  const vf n = vround(x), f = x - n;
  vf q = vset(1.54035303933816099544e-4f);
  q = vfma(q, f, vset(1.33335581464284434234e-3f));
  q = vfma(q, f, vset(9.61812910762847716197e-3f));
  q = vfma(q, f, vset(5.55041086648215799532e-2f));
  q = vfma(q, f, vset(2.40226506959100712334e-1f));
  q = vfma(q, f, vset(6.93147180559945309417e-1f));
  return vscale2(vfma(q, f, vset(1.0f)), n);
}

// Multiply-add of units.
struct FloatMac {
  static inline vf mac(vf a, vf b, vf c) { return vfma(a, b, c); }
};
#if MING_ISA_AVX512
struct PairMac {
  static inline vf mac(vf a, vf b, vf c) { return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)}; }
};
#endif

// C[MR, NV * VF] (+)= A[MR, depth] B[depth, NV * VF] in registers.
template <typename Mac, int MR, int NV>
void micro(int depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
           bool add) {
  vf acc[MR][NV];
  for (int m = 0; m < MR; ++m)
    for (int j = 0; j < NV; ++j) acc[m][j] = add ? vload(c + m * ldc + j * VF) : vzero();
  for (int u = 0; u < depth; ++u) {
    vf bv[NV];
    for (int j = 0; j < NV; ++j) bv[j] = vload(b + u * ldb + j * VF);
    for (int m = 0; m < MR; ++m) {
      const vf av = vset(a[m * lda + u]);
      for (int j = 0; j < NV; ++j) acc[m][j] = Mac::mac(av, bv[j], acc[m][j]);
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int j = 0; j < NV; ++j) vstore(c + m * ldc + j * VF, acc[m][j]);
}

template <typename Mac, int NV>
void micro_rows(int rows, int depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                int64_t ldc, bool add) {
  constexpr int MR = NV >= 5 ? 5 : 6;
  // Equal slices, so that no row is left over to run alone.
  const int slices = (rows + MR - 1) / MR;
  for (int i = 0, r = 0; i < slices; ++i) {
    const int n = (rows - r + slices - i - 1) / (slices - i);
    const float* ar = a + r * lda;
    float* cr = c + r * ldc;
    switch (n) {
      case 1:
        micro<Mac, 1, NV>(depth, ar, lda, b, ldb, cr, ldc, add);
        break;
      case 2:
        micro<Mac, 2, NV>(depth, ar, lda, b, ldb, cr, ldc, add);
        break;
      case 3:
        micro<Mac, 3, NV>(depth, ar, lda, b, ldb, cr, ldc, add);
        break;
      case 4:
        micro<Mac, 4, NV>(depth, ar, lda, b, ldb, cr, ldc, add);
        break;
      case 5:
        micro<Mac, 5, NV>(depth, ar, lda, b, ldb, cr, ldc, add);
        break;
      default:
        micro<Mac, MR, NV>(depth, ar, lda, b, ldb, cr, ldc, add);
        break;
    }
    r += n;
  }
}

// n is a multiple of VF.
template <typename Mac>
void gemm_units(int rows, int n, int depth, const float* a, int64_t lda, const float* b, int64_t ldb,
                float* c, int64_t ldc, bool add) {
  if (rows <= 0) return;
  for (int v = n / VF; v > 0;) {
#if MING_ISA_AVX512
    const int nv = v == 5 ? 5 : v > 4 ? 4 : v;
    switch (nv) {
      case 5:
        micro_rows<Mac, 5>(rows, depth, a, lda, b, ldb, c, ldc, add);
        break;
      case 4:
        micro_rows<Mac, 4>(rows, depth, a, lda, b, ldb, c, ldc, add);
        break;
      case 3:
        micro_rows<Mac, 3>(rows, depth, a, lda, b, ldb, c, ldc, add);
        break;
      case 2:
        micro_rows<Mac, 2>(rows, depth, a, lda, b, ldb, c, ldc, add);
        break;
      default:
        micro_rows<Mac, 1>(rows, depth, a, lda, b, ldb, c, ldc, add);
        break;
    }
#else
    const int nv = v >= 2 ? 2 : 1;
    nv == 2 ? micro_rows<Mac, 2>(rows, depth, a, lda, b, ldb, c, ldc, add)
            : micro_rows<Mac, 1>(rows, depth, a, lda, b, ldb, c, ldc, add);
#endif
    v -= nv;
    b += nv * VF;
    c += nv * VF;
  }
}

// Row maximum of scale * s over the first `len` scores, then p = 2^(scale * s - max) and zeros up to `width`,
// handed to `put(index, vector)`. `sum` adds vectors of equal position modulo 4 in key order.
template <typename Put>
inline void softmax_row(const float* s, int len, int width, float scale, float* max, float* sum, Put&& put) {
  const int whole = len / VF * VF;
  const vf none = vset(-std::numeric_limits<float>::infinity());
  vf m0 = none, m1 = none;
  int i = 0;
  for (; i + 2 * VF <= whole; i += 2 * VF) {
    m0 = vmax(m0, vload(s + i));
    m1 = vmax(m1, vload(s + i + VF));
  }
  for (; i < whole; i += VF) m0 = vmax(m0, vload(s + i));
  float tail[VF];
  if (whole < len) {
    vstore(tail, vload_n(s + whole, len - whole, -std::numeric_limits<float>::infinity()));
    m1 = vmax(m1, vload(tail));
  }
  const float top = vmaxall(vmax(m0, m1)) * scale;
  const bool empty = top == -std::numeric_limits<float>::infinity();  // a bias may exclude every key
  const vf c = vset(scale), shift = vset(empty ? 0.0f : -top);
  vf sums[4] = {vzero(), vzero(), vzero(), vzero()};
  i = 0;
  for (; i + 4 * VF <= whole; i += 4 * VF)
    for (int j = 0; j < 4; ++j) {
      const vf e = vexp2(vfma(vload(s + i + j * VF), c, shift));
      put(i + j * VF, e);
      sums[j] = sums[j] + e;
    }
  for (int j = 0; i < whole; i += VF, j = (j + 1) & 3) {
    const vf e = vexp2(vfma(vload(s + i), c, shift));
    put(i, e);
    sums[j] = sums[j] + e;
  }
  if (whole < len) {
    const int j = whole / VF & 3;
    const vf e = vexp2(vfma(vload(tail), c, shift));
    put(whole, e);
    sums[j] = sums[j] + e;
    i += VF;
  }
  for (; i < width; i += VF) put(i, vzero());
  *max = top;
  *sum = vsum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Into the second-level cache.
inline void prefetch(const void* p) {
  __builtin_prefetch(p, 0, 2);
}

// How tensors of element type T become units. The general form computes in fp32.
template <typename T>
struct Kernel {
  static constexpr int units(int elements) { return elements; }

  static void pack_row(float* to, const T* row, int dim) {
    for (int d = 0; d < dim; ++d) to[d] = to_float(row[d]);
  }
  // to[d, i] = rows[i][d], zeros from key n to the next multiple of VF
  static void pack_k(float* to, const T* const* rows, int n, int dim, const T* const* next) {
    for (int i = 0; i < n; i += VF)
      for (int d = 0; d < dim; d += VF) {
        const int w = dim - d;
        vf t[VF];
        for (int j = 0; j < VF; ++j) t[j] = i + j >= n ? vzero() : vload_n(rows[i + j] + d, w);
        for (int j = 0; j < VF; ++j) prefetch(next[i + j] + d);
        store_transposed(t, to + int64_t(d) * kBlock + i, kBlock, w);
      }
  }
  // to[i, d] = rows[i][d], zero padded to dp; returns the depth of the product in units
  static int pack_v(float* to, const T* const* rows, int n, int dim, int dp, const T* const* next) {
    for (int i = 0; i < n; ++i)
      for (int d = 0; d < dp; d += VF) {
        prefetch(next[i] + d);
        vstore(to + int64_t(i) * dp + d, vload_n(rows[i] + d, dim - d));
      }
    return n;
  }
  static void softmax(float* s, int len, int width, float scale, float* max, float* sum) {
    softmax_row(s, len, width, scale, max, sum, [&](int i, vf e) { vstore(s + i, e); });
  }
  static void gemm(int rows, int n, int depth, const float* a, int64_t lda, const float* b, int64_t ldb,
                   float* c, int64_t ldc, bool add) {
    gemm_units<FloatMac>(rows, n, depth, a, lda, b, ldb, c, ldc, add);
  }
};

#if MING_ISA_AVX512
// bfloat16 pairs along the summed dimension: head dims for q k, keys for p v.
template <>
struct Kernel<bf16> {
  static constexpr int units(int elements) { return (elements + 1) / 2; }

  static __mmask32 mask32(int n) { return n >= 32 ? ~__mmask32(0) : (__mmask32(1) << n) - 1; }
  static __m512i load32(const bf16* p, int n) {
    return n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(mask32(n), p);
  }

  static void pack_row(float* to, const bf16* row, int dim) {
    for (int d = 0; d < dim; d += 32)
      _mm512_mask_storeu_epi32(to + d / 2,
                               __mmask16(units(dim - d) >= 16 ? 0xffff : (1 << units(dim - d)) - 1),
                               load32(row + d, dim - d));
  }
  static void pack_k(float* to, const bf16* const* rows, int n, int dim, const bf16* const* next) {
    const int total = units(dim);
    for (int i = 0; i < n; i += VF)
      for (int u = 0; u < total; u += VF) {
        vf t[VF];
        for (int j = 0; j < VF; ++j)
          t[j].v = i + j >= n ? _mm512_setzero_ps()
                              : _mm512_castsi512_ps(load32(rows[i + j] + 2 * u, dim - 2 * u));
        for (int j = 0; j < VF; ++j) prefetch(next[i + j] + 2 * u);
        store_transposed(t, to + int64_t(u) * kBlock + i, kBlock, total - u);
      }
  }
  static int pack_v(float* to, const bf16* const* rows, int n, int dim, int dp, const bf16* const* next) {
    alignas(64) static const uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                  11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int i = 0; i < n; i += 2)
      for (int d = 0; d < dim; d += 32) {
        const __m512i a = load32(rows[i] + d, dim - d);
        const __m512i b = i + 1 < n ? load32(rows[i + 1] + d, dim - d) : _mm512_setzero_si512();
        float* at = to + int64_t(i / 2) * dp + d;
        prefetch(next[i] + d);
        prefetch(next[i + 1] + d);
        _mm512_storeu_si512(at, _mm512_permutex2var_epi16(a, low, b));
        if (d + VF < dp) _mm512_storeu_si512(at + VF, _mm512_permutex2var_epi16(a, high, b));
      }
    return (n + 1) / 2;
  }
  static void softmax(float* s, int len, int width, float scale, float* max, float* sum) {
    bf16* p = reinterpret_cast<bf16*>(s);
    softmax_row(s, len, width, scale, max, sum, [&](int i, vf e) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + i), (__m256i)_mm512_cvtneps_pbh(e.v));
    });
  }
  static void gemm(int rows, int n, int depth, const float* a, int64_t lda, const float* b, int64_t ldb,
                   float* c, int64_t ldc, bool add) {
    gemm_units<PairMac>(rows, n, depth, a, lda, b, ldb, c, ldc, add);
  }
};
#endif

}  // namespace
}  // namespace MING_ISA
}  // namespace ming
