// Matrix products with packed weights: y = epilogue(x W^T), for every number of rows from one (decode) up.
//
// Packed weight of W [N, K]: ceil(N/64) panels of 64 output columns, zero padded in N and K.
//   float32:   [panels][K][64]
//   bfloat16:  [panels][ceil(K/2)][64][2]      two consecutive k of one column lie side by side
// Gated weight of gate [I, K] and up [I, K]: ceil(I/32) panels whose columns 0..31 are rows of gate
// and 32..63 the same rows of up, so that silu(g) * u is formed where both sums already are.
//
//   linear:        y = round(round(act(sum_k x w + bias)) + residual)       rounding to the output dtype
//   gated weight:  y = round(silu(gate sum + bias) * (up sum + bias))       fp32 until the one rounding
// Sums are fp32, over k in ascending order (pairs for bfloat16) whatever M, the tile position or the number
// of threads: a row's result depends on nothing but that row.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"
#include "common/dtype.h"

namespace ming {

constexpr int kPanelColumns = 64;

// Elements of one packed panel.
constexpr int64_t panel_size(DType dtype, int64_t k) {
  return kPanelColumns * (dtype == DType::bf16 ? (k + 1) / 2 * 2 : k);
}
// Output columns of one panel.
constexpr int64_t panel_outputs(bool gated) {
  return gated ? kPanelColumns / 2 : kPanelColumns;
}

constexpr int64_t panel_count(int64_t n, bool gated) {
  return (n + panel_outputs(gated) - 1) / panel_outputs(gated);
}

enum class Act : int32_t { none, gelu, silu, relu };  // gelu: 0.5 x (1 + erf(x / sqrt 2))

struct LinearParams {
  const void* x;     // [M, K] of `dtype`, row stride x_stride (rows may overlap)
  const void* w;     // packed, `dtype`
  const void* bias;  // [N], gated: [2N] (gate then up), of `dtype`; or nullptr
  // [M, N] of out_dtype, row stride residual_stride, or nullptr; not with a gated weight
  const void* residual;
  void* y;          // [M, N] of out_dtype, row stride y_stride; may alias residual, not x
  int64_t m, n, k;  // n: outputs (I of a gated weight)
  int64_t x_stride, residual_stride, y_stride;
  DType dtype, out_dtype;  // float32 or bfloat16
  Act act;
  bool gated;
};

struct PackParams {
  const void* source[2];  // [n, k] of source_dtype (float32, float16 or bfloat16); [1]: up of a gated weight
  int64_t source_stride[2];  // row strides
  void* packed;              // panel_count(n) * panel_size elements of `dtype`, 64-byte aligned
  int64_t n, k;
  DType source_dtype, dtype;
  bool gated;
};

MING_CPU_OP(linear, LinearParams)
MING_CPU_OP(pack_weight, PackParams)

}  // namespace ming
