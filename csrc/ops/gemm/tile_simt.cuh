// One output tile of a matrix product in fp32 FMAs: float32 x with weights of any format.
#pragma once

#include "ops/gemm/tile_gemm.cuh"

namespace ming::cuda::tile {

// 64 x 64 outputs by 128 threads, 8 rows x 4 columns each, in steps of 16 k.
constexpr int kSimtM = 64, kSimtN = 64, kSimtK = 16, kSimtThreads = 128;

// Eight values from k on of a row of `size` values; zeros behind it, or for no row.
__device__ __forceinline__ void read_eight(const float* row, int k, int size, bool wide, float (&v)[8]) {
  if (row && wide && k + 8 <= size) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const Vec<float, 4> piece = load<4>(row + k + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) v[i + j] = piece.at[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = row && k + i < size ? row[k + i] : 0.0f;
  }
}

// The same of a weight row in any format: scale * q is exact in fp32.
__device__ __forceinline__ void read_weight(WeightFormat format, const unsigned char* row, const bf16* scales,
                                            int k, int k_padded, float (&v)[8]) {
  if (format == WeightFormat::plain) {
    read_eight(reinterpret_cast<const float*>(row), k, k_padded, true, v);
    return;
  }
  const bool inside = row && k < k_padded;
  const float scale = inside ? to_float(scales[k / kQuantGroup]) : 0.0f;
  const bool bytes = format == WeightFormat::int8;
  uint2 q = {0, 0};
  if (inside && bytes) q = *reinterpret_cast<const uint2*>(row + k);
  if (inside && !bytes) q.x = *reinterpret_cast<const uint32_t*>(row + k / 2);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t word = i < 4 ? q.x : q.y;
    v[i] = scale * float(bytes ? int(int8_t(word >> 8 * (i % 4))) : int(q.x >> 4 * i & 15) - 8);
  }
}

// As run_tile.
template <typename XRow, typename YRow>
__device__ __forceinline__ void run_simt_tile(const Operands& o, const unsigned char* w, const bf16* scales,
                                              int first_column, XRow&& x_row, YRow&& y_row) {
  constexpr int kPitch = kSimtM + 4;
  // Transposed, so that a thread reads its rows and columns of one k as vectors; two buffers.
  MING_SHARED(float, xs, [2][kSimtK][kPitch]);
  MING_SHARED(float, ws, [2][kSimtK][kPitch]);
  const int row = threadIdx.x % 64, k_first = threadIdx.x / 64 * 8;
  const int64_t from = x_row(row);
  const float* const x = from < 0 ? nullptr : static_cast<const float*>(o.x) + from * o.x_stride;
  const int column = first_column + row;
  const bool present = column < o.w_rows;
  const unsigned char* const w_from = present ? w + column * o.w_row_bytes : nullptr;
  const bf16* const scales_from = present ? scales + int64_t(column) * o.scale_count : nullptr;
  const int k_padded = int(row_elements(DType::f32, o.format, o.k));

  float x_next[8], w_next[8];
  const auto fetch = [&](int k0) {
    read_eight(x, k0 + k_first, o.k, o.wide, x_next);
    read_weight(o.format, w_from, scales_from, k0 + k_first, k_padded, w_next);
  };
  const auto keep = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      xs[buffer][k_first + i][row] = x_next[i];
      ws[buffer][k_first + i][row] = w_next[i];
    }
  };

  const int my_row = threadIdx.x / 16 * 8, my_column = threadIdx.x % 16 * 4;
  float sums[8][4] = {};
  fetch(0);
  keep(0);
  __syncthreads();
  int buffer = 0;
  for (int k0 = 0; k0 < o.k; k0 += kSimtK) {
    const bool more = k0 + kSimtK < o.k;
    if (more) fetch(k0 + kSimtK);
#pragma unroll
    for (int k = 0; k < kSimtK; ++k) {
      const Vec<float, 4> low = load<4>(&xs[buffer][k][my_row]), high = load<4>(&xs[buffer][k][my_row + 4]);
      const Vec<float, 4> b = load<4>(&ws[buffer][k][my_column]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          sums[i][j] = fmaf(i < 4 ? low.at[i % 4] : high.at[i % 4], b.at[j], sums[i][j]);
      }
    }
    if (more) {
      keep(buffer ^ 1);  // its readers have passed the barrier of the step before
      __syncthreads();
      buffer ^= 1;
    }
  }

  const int to = first_column + my_column;
  if (to >= o.out.columns) return;
  float bias[4];
  quad_bias(o.out, to, bias);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t y = y_row(my_row + i);
    if (y < 0) continue;
    float v[4], residual[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = sums[i][j] + bias[j];
    if (o.out.dtype == DType::f32) {
      if (o.out.residual) quad_residual<float>(o.out, y, to, residual);
      finish_quad<float>(o.out, y, to, v, residual);
    } else {
      if (o.out.residual) quad_residual<bf16>(o.out, y, to, residual);
      finish_quad<bf16>(o.out, y, to, v, residual);
    }
  }
}

}  // namespace ming::cuda::tile
