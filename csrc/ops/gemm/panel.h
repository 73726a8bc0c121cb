// The microkernel under every matrix product: a few rows of x times one packed panel of 64 columns.
// Included by *_cpu.cpp files only; everything is local to the including file and ISA.
#pragma once

#include "common/simd.h"
#include "ops/gemm/gemm.h"

namespace ming {
namespace MING_ISA {
namespace {

// Tile: rows whose sums are held in registers at once, and vectors of columns beside each other.
#if MING_ISA_AVX512
constexpr int kTileVectors = 4;
template <typename T>
constexpr int tile_rows() {
  return 6;
}
#elif MING_ISA_AVX2
constexpr int kTileVectors = 2;
template <typename T>
constexpr int tile_rows() {
  return sizeof(T) == 4 ? 6 : 4;
}
#else
constexpr int kTileVectors = 1;
template <typename T>
constexpr int tile_rows() {
  return sizeof(T) == 4 ? 4 : 1;  // more bfloat16 rows spill on a 16 x 128-bit register file
}
#endif
constexpr int kMaxTileRows = 6;
constexpr int kTileColumns = kTileVectors * VF;

// acc[m][n] = sum_k x[m][k] * w[k][n] of float32 panels
template <int M>
void panel_dot(const float* const* x, const float* panel, int64_t k, float* acc) {
  const float* row[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) row[m] = x[m];
  for (int column = 0; column < kPanelColumns; column += kTileColumns) {
    vf sum[M][kTileVectors];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sum[m][v] = vzero();
    const float* w = panel + column;
    for (int64_t i = 0; i < k; ++i, w += kPanelColumns) {
      vf b[kTileVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) b[v] = vload(w + v * VF);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const vf a = vset(row[m][i]);
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) sum[m][v] = vfma(a, b[v], sum[m][v]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) vstore(acc + m * kPanelColumns + column + v * VF, sum[m][v]);
  }
}

#if MING_ISA_AVX512

// The same of bfloat16 panels: one instruction multiplies and adds a pair of consecutive k.
template <int M>
void panel_dot(const bf16* const* x, const bf16* panel, int64_t k, float* acc) {
  const bf16* row[M];
  __m512 sum[M][4];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    row[m] = x[m];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[m][v] = _mm512_setzero_ps();
  }
  auto step = [&](int64_t pair, auto&& broadcast) __attribute__((always_inline)) {
    const bf16* w = panel + pair * 2 * kPanelColumns;
    __m512bh b[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) b[v] = (__m512bh)_mm512_load_si512(w + v * 32);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const __m512bh a = (__m512bh)broadcast(m);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], a, b[v]);
    }
  };
  const int64_t pairs = k / 2;
  for (int64_t i = 0; i < pairs; ++i)
    step(i, [&](int m) __attribute__((always_inline)) {
      int32_t both;
      std::memcpy(&both, row[m] + 2 * i, 4);
      return _mm512_set1_epi32(both);
    });
  // An odd last k must not touch what lies behind the row.
  if (k % 2)
    step(pairs, [&](int m) __attribute__((always_inline)) { return _mm512_set1_epi32(row[m][k - 1].bits); });
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) _mm512_store_ps(acc + m * kPanelColumns + v * 16, sum[m][v]);
}

#else

struct Pair {
  vf even, odd;
};

#if MING_ISA_AVX2
inline Pair split(__m256i pairs) {
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))))}};
}
inline Pair load_pairs(const bf16* p) {
  return split(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Pair broadcast_pair(const bf16* p) {
  int32_t both;
  std::memcpy(&both, p, 4);
  return split(_mm256_set1_epi32(both));
}
#else
inline Pair load_pairs(const bf16* p) {
  // Whole 32-bit words (little-endian: even k below), which compilers turn into vector shifts and masks.
  uint32_t words[VF], even[VF], odd[VF];
  std::memcpy(words, p, sizeof(words));
  for (int i = 0; i < VF; ++i) even[i] = words[i] << 16;
  for (int i = 0; i < VF; ++i) odd[i] = words[i] & 0xffff0000u;
  Pair r;
  std::memcpy(r.even.v, even, sizeof(even));
  std::memcpy(r.odd.v, odd, sizeof(odd));
  return r;
}
inline Pair broadcast_pair(const bf16* p) {
  return {vset(to_float(p[0])), vset(to_float(p[1]))};
}
#endif

template <int M>
void panel_dot(const bf16* const* x, const bf16* panel, int64_t k, float* acc) {
  const bf16* row[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) row[m] = x[m];
  for (int column = 0; column < kPanelColumns; column += kTileColumns) {
    vf sum[M][kTileVectors];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sum[m][v] = vzero();
    const bf16* w = panel + 2 * column;
    for (int64_t i = 0; i + 1 < k; i += 2, w += 2 * kPanelColumns) {
      Pair b[kTileVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) b[v] = load_pairs(w + 2 * v * VF);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Pair a = broadcast_pair(row[m] + i);
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) sum[m][v] = vfma(a.even, b[v].even, sum[m][v]);
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) sum[m][v] = vfma(a.odd, b[v].odd, sum[m][v]);
      }
    }
    if (k % 2)
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < kTileVectors; ++v)
          sum[m][v] = vfma(vset(to_float(row[m][k - 1])), load_pairs(w + 2 * v * VF).even, sum[m][v]);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) vstore(acc + m * kPanelColumns + column + v * VF, sum[m][v]);
  }
}

#endif

template <typename T, int M = tile_rows<T>()>
void panel_tile(int rows, const T* const* x, const T* panel, int64_t k, float* acc) {
  if constexpr (M > 1) {
    if (rows < M) return panel_tile<T, M - 1>(rows, x, panel, k, acc);
  }
  panel_dot<M>(x, panel, k, acc);
}

// Runs rows [begin, end) against one panel: row_at(i) gives a row of x, store(i, sums) takes its 64 fp32
// sums.
template <typename T, typename RowAt, typename Store>
void panel_rows(int64_t begin, int64_t end, const T* panel, int64_t k, RowAt&& row_at, Store&& store) {
  alignas(64) float acc[kMaxTileRows * kPanelColumns];
  const T* x[kMaxTileRows];
  for (int64_t i = begin; i < end; i += tile_rows<T>()) {
    const int rows = end - i < tile_rows<T>() ? int(end - i) : tile_rows<T>();
    for (int m = 0; m < rows; ++m) x[m] = row_at(i + m);
    panel_tile<T>(rows, x, panel, k, acc);
    for (int m = 0; m < rows; ++m) store(i + m, acc + m * kPanelColumns);
  }
}

// Rows of x per work item: few enough that every thread gets several items, at most 768 so that the rows stay
// in a shared cache while the panels pass by.
inline int64_t rows_per_item(int64_t rows, int64_t panels, int threads) {
  const int64_t wanted = 4 * int64_t(threads);  // items
  int64_t blocks = (rows + 767) / 768;
  const int64_t most = (rows + 47) / 48;  // below 48 rows the panel's way from memory dominates
  if (blocks * panels < wanted) blocks = (wanted + panels - 1) / panels;
  if (blocks > most) blocks = most;
  return rows < 1 ? 12 : ((rows + blocks - 1) / blocks + 11) / 12 * 12;
}

// Work items handed out at once, so that tiny products are not all bookkeeping.
inline int64_t item_grain(int64_t rows, int64_t k) {
  return 1 + 65536 / (kPanelColumns * (k + 1) * (rows + 1));
}

// silu(g) * u of the 64 sums of a gated panel, the first `columns` <= 32 of them
template <typename T>
void store_gated(const float* sums, int columns, T* y) {
  constexpr int half = kPanelColumns / 2;
  for (int c = 0; c < columns; c += VF) {
    const vf v = vsilu(vload(sums + c)) * vload(sums + half + c);
    vstore_n(y + c, v, columns - c);
  }
}

template <typename T>
void store_plain(const float* sums, int columns, T* y) {
  for (int c = 0; c < columns; c += VF) vstore_n(y + c, vload(sums + c), columns - c);
}

}  // namespace
}  // namespace MING_ISA
}  // namespace ming
