// Products and the running softmax of one warp on tensor cores. A warp has M x 16 rows; of each 16, thread
// `lane` holds rows lane / 4 and lane / 4 + 8 and in every 8 columns two, 2 * (lane % 4) and the next.
#pragma once

#include <type_traits>

#include "ops/attention/device.cuh"

namespace ming::cuda::attention_detail {

// Rows of D values in shared memory: an odd number of 16-byte units, so that ldmatrix meets no bank twice.
template <int D>
constexpr int kPitch = D + 8;

// Starts the copy of Count rows by Threads threads; `place(row)` says where a row begins, in values from
// `from`; below 0: zeros. Neighbouring threads share a row, and a thread's rows are a constant step apart,
// which keeps addresses few.
template <int D, int Threads, int Count, typename Place>
__device__ __forceinline__ void copy_rows(bf16* to, const bf16* from, Place&& place) {
  constexpr int kTogether = D % 64 == 0 ? D / 8 : 2, kStep = Threads / kTogether;
  const int thread = int(threadIdx.x) % Threads, first = thread / kTogether, column = thread % kTogether * 8;
  to += first * kPitch<D> + column;
  from += column;
#pragma unroll
  for (int i = 0; i < Count / kStep; ++i) {
    const int64_t at = place(first + i * kStep);
    const bool valid = at >= 0;
#pragma unroll
    for (int d = 0; d < D; d += 8 * kTogether)
      cp_async16(to + i * kStep * kPitch<D> + d, from + (valid ? at : 0) + d, valid);
  }
}

// Row of shared memory, and 8 columns of it, that a lane names to ldmatrix_x4 for 16 rows x 16 columns: as
// operand a (rows first), or as two operands b (columns first).
__device__ __forceinline__ int row_first(int pitch) {
  const int lane = int(threadIdx.x) % 32;
  return (lane % 16) * pitch + lane / 16 * 8;
}
__device__ __forceinline__ int column_first(int pitch) {
  const int lane = int(threadIdx.x) % 32;
  return (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8;
}

// scores[16 M, Keys] = q k^T; `load_q(a, d)` gives operand a of the columns from d on.
template <int D, int M, int Keys, typename LoadQ>
__device__ __forceinline__ void multiply_keys(float (&scores)[M][Keys / 8][4], LoadQ&& load_q,
                                              const bf16* k) {
  k += column_first(kPitch<D>);
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[m][n][i] = 0;
#pragma unroll
  for (int d = 0; d < D; d += 16) {
    uint32_t a[M][4];
    load_q(a, d);
#pragma unroll
    for (int n = 0; n < Keys / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4(b, k + 16 * n * kPitch<D> + d);
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma_bf16(scores[m][2 * n], a[m], low);
        mma_bf16(scores[m][2 * n + 1], a[m], high);
      }
    }
  }
}

// -inf for the keys, from key0 on, that a row does not see; `visible(m, h)` says how many this
// thread's row lane / 4 + 8 h of each 16 sees.
template <int M, int Keys, typename Visible>
__device__ __forceinline__ void mask_keys(float (&scores)[M][Keys / 8][4], int32_t key0, Visible&& visible) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int32_t seen = visible(m, h) - key0 - lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < Keys / 8; ++n) {
        if (8 * n >= seen) scores[m][n][2 * h] = kMinusInf;
        if (8 * n + 1 >= seen) scores[m][n][2 * h + 1] = kMinusInf;
      }
    }
}

// Over the four threads that share a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// Running maximum (of scores times scale_log2; -inf: no key yet), sum and unnormalised output of a warp's
// rows.
template <int D, int M>
struct Softmax {
  float max[M][2], sum[M][2], out[M][D / 8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      max[m][0] = max[m][1] = kMinusInf;
      sum[m][0] = sum[m][1] = 0;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[m][n][i] = 0;
    }
  }

  // Turns scores into weights relative to the new maximum and shrinks what was added so far. Each thread sums
  // its own columns. Keys that no row sees change nothing, to the bit.
  template <int Keys>
  __device__ __forceinline__ void add(float (&scores)[M][Keys / 8][4], float scale_log2) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = kMinusInf;
#pragma unroll
        for (int n = 0; n < Keys / 8; ++n)
          top = fmaxf(top, fmaxf(scores[m][n][2 * h], scores[m][n][2 * h + 1]));
        top = fmaxf(max[m][h], row_max(top) * scale_log2);
        const float shift = top == kMinusInf ? 0.0f : top, shrink = exp2_approx(max[m][h] - shift);
        max[m][h] = top;
        float part = 0;
#pragma unroll
        for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
          for (int i = 2 * h; i < 2 * h + 2; ++i) {
            scores[m][n][i] = exp2_approx(fmaf(scores[m][n][i], scale_log2, -shift));
            part += scores[m][n][i];
          }
        sum[m][h] = fmaf(sum[m][h], shrink, part);
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          out[m][n][2 * h] *= shrink;
          out[m][n][2 * h + 1] *= shrink;
        }
      }
  }

  // out += weights v
  template <int Keys>
  __device__ __forceinline__ void add_values(const float (&weights)[M][Keys / 8][4], const bf16* v) {
    v += row_first(kPitch<D>);
#pragma unroll
    for (int n = 0; n < Keys / 16; ++n) {
      uint32_t a[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[m][i] = pack_bf16(weights[m][2 * n + i / 2][i % 2 * 2], weights[m][2 * n + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, v + 16 * n * kPitch<D> + 16 * d);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < M; ++m) {
          mma_bf16(out[m][2 * d], a[m], low);
          mma_bf16(out[m][2 * d + 1], a[m], high);
        }
      }
    }
  }

  // Sums over whole rows; after the last add.
  __device__ __forceinline__ void finish_sums() {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      sum[m][0] = row_sum(sum[m][0]);
      sum[m][1] = row_sum(sum[m][1]);
    }
  }
};

// Calls fn with the head_dim as a constant.
template <typename F>
inline void with_tensor_core_dim(int head_dim, F&& fn) {
  if (head_dim == 64)
    fn(std::integral_constant<int, 64>{});
  else if (head_dim == 80)
    fn(std::integral_constant<int, 80>{});
  else
    fn(std::integral_constant<int, 128>{});
}

}  // namespace ming::cuda::attention_detail
