// Matrix products with packed weights: y = epilogue(x W^T), for every number of rows from one (decode) up.
//
//   linear:        y = round(round(act(sum_k x w + bias)) + residual)       rounding to the output dtype
//   gated weight:  y = round(silu(gate sum + bias) * (up sum + bias))       fp32 until the one rounding
//
// Packed weight of W [N, K] on the CPU, "panels": ceil(N/64) panels of 64 output columns, zero padded in N
// and K.
//   float32:   [panels][K][64]
//   bfloat16:  [panels][ceil(K/2)][64][2]      two consecutive k of one column lie side by side
// Gated weight of gate [I, K] and up [I, K]: ceil(I/32) panels whose columns 0..31 are rows of gate
// and 32..63 the same rows of up, so that silu(g) * u is formed where both sums already are.
// Sums are fp32, over k in ascending order (pairs for bfloat16) whatever M, the tile position or the number
// of threads: a row's result depends on nothing but that row.
//
// Packed weight on a CUDA device, "rows": [rows][kp], K contiguous, kp = row_elements() with zeros behind K.
// rows = N; gated: 2 I, row 2i is row i of gate and row 2i + 1 row i of up.
//   WeightFormat::plain  kp is K rounded up to 16 bytes of float32 or bfloat16
//   int8, int4           kp is K rounded up to 64: groups of 64 along K, each with a bfloat16 scale in
//                        [rows][kp / 64], scale = round(max |w| / 127) for int8, / 7 for int4,
//                        q = clamp(round half to even(w / scale)) within +-127 or +-7; scale 0: q = 0.
//                        int8: one byte per q. int4: byte j holds q of k = 2j in the low and of 2j + 1 in the
//                        high half, both as q + 8. The weight is scale * q, exact in fp32.
// Sums are fp32, in an order fixed by K alone within each of the two regimes, few rows (a weight is streamed)
// and many rows (tiles), see heuristics.h: there a row's result depends on nothing but that row.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/op.h"

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

enum class WeightFormat : int32_t { plain, int8, int4 };

constexpr int kQuantGroup = 64;  // values of k that share a scale

// The "rows" layout: rows of a weight of n outputs; values, bytes and scales of a row.
constexpr int64_t row_count(int64_t n, bool gated) {
  return gated ? 2 * n : n;
}
constexpr int64_t row_elements(DType dtype, WeightFormat format, int64_t k) {
  const int64_t unit = format != WeightFormat::plain ? kQuantGroup : dtype == DType::bf16 ? 8 : 4;
  return (k + unit - 1) / unit * unit;
}
constexpr int64_t row_bytes(DType dtype, WeightFormat format, int64_t k) {
  const int64_t elements = row_elements(dtype, format, k);
  return format == WeightFormat::int8   ? elements
         : format == WeightFormat::int4 ? elements / 2
                                        : elements * (dtype == DType::bf16 ? 2 : 4);
}
constexpr int64_t row_scales(int64_t k) {
  return (k + kQuantGroup - 1) / kQuantGroup;
}

enum class Act : int32_t { none, gelu, silu, relu };  // gelu: 0.5 x (1 + erf(x / sqrt 2))

struct LinearParams {
  const void* x;     // [M, K] of `dtype`, row stride x_stride (rows may overlap)
  const void* w;     // packed, of `dtype` where `format` is plain
  const void* bias;  // [N], gated: [2N] (gate then up), of `dtype`; or nullptr
  // [M, N] of out_dtype, row stride residual_stride, or nullptr; not with a gated weight
  const void* residual;
  void* y;          // [M, N] of out_dtype, row stride y_stride; may alias residual, not x
  int64_t m, n, k;  // n: outputs (I of a gated weight)
  int64_t x_stride, residual_stride, y_stride;
  DType dtype, out_dtype;  // float32 or bfloat16
  Act act;
  bool gated;
  const void* scales;  // bfloat16 [row_count(n)][row_scales(k)] of a quantised weight, else nullptr
  WeightFormat format;
};

struct PackParams {
  const void* source[2];  // [n, k] of source_dtype (float32, float16 or bfloat16); [1]: up of a gated weight
  int64_t source_stride[2];  // row strides
  void* packed;              // panels, on a device rows; 64-byte aligned
  int64_t n, k;
  DType source_dtype, dtype;
  bool gated;
  void* scales;  // where the result is quantised: bfloat16 [row_count(n)][row_scales(k)]
  WeightFormat format;
};

// The last step of linear alone, for sums that a library's product left.
struct LinearEpilogueParams {
  LinearParams linear;  // x and w are not used
  const float* sums;    // [M, row_count(n)], contiguous, in the order of the "rows" layout
};

MING_OP(linear, LinearParams)
MING_OP(pack_weight, PackParams)
namespace cuda {
void linear_epilogue(const LinearEpilogueParams& p, Stream stream);
}

}  // namespace ming
