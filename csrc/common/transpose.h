// Square transposes in registers: 16x16 bytes, 4x4 floats, VF x VF 32-bit words.
#pragma once

#include "common/simd.h"

namespace ming {
namespace MING_ISA {

typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef float Floats4 __attribute__((vector_size(16)));

// By perfect shuffles.
static inline void transpose(Bytes16* a) {
  Bytes16 b[16];
  for (int stage = 0; stage < 4; ++stage) {
    for (int i = 0; i < 8; ++i) {
      b[2 * i] =
          __builtin_shufflevector(a[i], a[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14,
                                             30, 15, 31);
    }
    for (int i = 0; i < 16; ++i) a[i] = b[i];
  }
}

static inline void transpose(Floats4* a) {
  Floats4 b[4];
  for (int stage = 0; stage < 2; ++stage) {
    for (int i = 0; i < 2; ++i) {
      b[2 * i] = __builtin_shufflevector(a[i], a[i + 2], 0, 4, 1, 5);
      b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 2], 2, 6, 3, 7);
    }
    for (int i = 0; i < 4; ++i) a[i] = b[i];
  }
}

// A VF x VF block of 32-bit words, whatever they hold.
#if MING_ISA_AVX512
static inline void transpose(vf* t) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(t[i].v, t[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(t[i].v, t[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a[i]), _mm512_castps_pd(a[i + 2])));
    b[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a[i]), _mm512_castps_pd(a[i + 2])));
    b[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a[i + 1]), _mm512_castps_pd(a[i + 3])));
    b[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a[i + 1]), _mm512_castps_pd(a[i + 3])));
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    t[i].v = _mm512_shuffle_f32x4(a[i], a[i + 8], 0x88);
    t[i + 8].v = _mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd);
    t[i + 4].v = _mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0x88);
    t[i + 12].v = _mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0xdd);
  }
}
#elif MING_ISA_AVX2
static inline void transpose(vf* t) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(t[i].v, t[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(t[i].v, t[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    t[i + 4].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}
#else
static inline void transpose(vf* t) {
  for (int i = 0; i < VF; ++i)
    for (int j = 0; j < i; ++j) {
      const float x = t[i].v[j];
      t[i].v[j] = t[j].v[i];
      t[j].v[i] = x;
    }
}
#endif

// Transposes t and stores its first `count` rows (VF or more: all) at `to`, `stride` words apart.
static inline void store_transposed(vf* t, void* to, int64_t stride, int64_t count) {
  transpose(t);
  char* at = static_cast<char*>(to);
  // A fixed number of stores keeps the block in registers.
  if (count >= VF)
    for (int j = 0; j < VF; ++j) std::memcpy(at + 4 * j * stride, &t[j], sizeof(vf));
  else
    for (int j = 0; j < count; ++j) std::memcpy(at + 4 * j * stride, &t[j], sizeof(vf));
}

template <typename T>
struct TransposeBlock;
template <>
struct TransposeBlock<uint8_t> {
  using Vector = Bytes16;
};
template <>
struct TransposeBlock<float> {
  using Vector = Floats4;
};

// tile[i][lane] = row[lane][i] for `count` values of `Lanes` rows, which are a multiple of the block.
template <int Lanes, typename T>
static inline void rows_to_tile(const T* const* row, int64_t count, T* tile) {
  using V = typename TransposeBlock<T>::Vector;
  constexpr int B = sizeof(V) / sizeof(T);
  static_assert(Lanes % B == 0);
  const int64_t whole = count / B * B;
  V a[B];
  for (int64_t i = 0; i < whole; i += B)
    for (int r0 = 0; r0 < Lanes; r0 += B) {
      for (int r = 0; r < B; ++r) std::memcpy(&a[r], row[r0 + r] + i, sizeof(V));
      transpose(a);
      for (int r = 0; r < B; ++r) std::memcpy(tile + (i + r) * Lanes + r0, &a[r], sizeof(V));
    }
  for (int64_t i = whole; i < count; ++i)
    for (int r = 0; r < Lanes; ++r) tile[i * Lanes + r] = row[r][i];
}

// The inverse, for the first `rows` rows.
template <int Lanes, typename T>
static inline void tile_to_rows(const T* tile, int64_t count, int rows, T* dst, int64_t stride) {
  using V = typename TransposeBlock<T>::Vector;
  constexpr int B = sizeof(V) / sizeof(T);
  static_assert(Lanes % B == 0);
  const int64_t whole = count / B * B;
  V a[B];
  for (int64_t i = 0; i < whole; i += B)
    for (int r0 = 0; r0 < rows; r0 += B) {
      for (int r = 0; r < B; ++r) std::memcpy(&a[r], tile + (i + r) * Lanes + r0, sizeof(V));
      transpose(a);
      for (int r = 0; r < B && r0 + r < rows; ++r) std::memcpy(dst + (r0 + r) * stride + i, &a[r], sizeof(V));
    }
  for (int64_t i = whole; i < count; ++i)
    for (int r = 0; r < rows; ++r) dst[r * stride + i] = tile[i * Lanes + r];
}

}  // namespace MING_ISA
}  // namespace ming
