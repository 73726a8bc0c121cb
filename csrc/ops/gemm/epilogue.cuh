// What happens to the sums of a product: shared by all CUDA kernels of linear and of the experts.
#pragma once

#include "common/gpu.h"
#include "ops/gemm/gemm.h"

namespace ming::gpu {

__device__ __forceinline__ float silu(float x) {
  return x / (1.0f + expf(-x));
}

__device__ __forceinline__ float activate(Act act, float x) {
  switch (act) {
    case Act::gelu:
      return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case Act::silu:
      return silu(x);
    case Act::relu:
      return x < 0.0f ? 0.0f : x;  // keeps NaN
    default:
      return x;
  }
}

// Output `column` of `row` from its sum; T: dtype of the bias, O: of residual and output.
template <typename T, typename O>
__device__ __forceinline__ void finish(const LinearParams& p, int64_t row, int64_t column, float sum) {
  if (p.bias) sum += to_float(static_cast<const T*>(p.bias)[column]);
  sum = activate(p.act, sum);
  if (p.residual)
    sum = rounded<O>(sum) + to_float(static_cast<const O*>(p.residual)[row * p.residual_stride + column]);
  static_cast<O*>(p.y)[row * p.y_stride + column] = from_float<O>(sum);
}

// Output `column` of `row` of a gated weight from the sums of its rows 2 * column and 2 * column + 1.
template <typename T, typename O>
__device__ __forceinline__ void finish_gated(const LinearParams& p, int64_t row, int64_t column, float gate,
                                             float up) {
  if (const T* bias = static_cast<const T*>(p.bias)) {
    gate += to_float(bias[column]);
    up += to_float(bias[p.n + column]);
  }
  static_cast<O*>(p.y)[row * p.y_stride + column] = from_float<O>(silu(gate) * up);
}

}  // namespace ming::gpu
