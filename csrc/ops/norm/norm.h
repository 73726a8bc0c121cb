// rms_norm and layer_norm over the last dimension.
//
//   rms_norm:    z = x (+ residual, the sum rounded to the dtype and stored to `sum`)
//                n = z * 1/sqrt(mean(z^2) + eps)                                   in fp32
//                y = round(n * weight)             weight_in_fp32 = true           one rounding
//                y = round(round(n) * weight)      weight_in_fp32 = false          two roundings
//   layer_norm:  y = round((x - mean) / sqrt(var + eps) * weight + bias)           in fp32, biased variance
//
// x, residual, y, sum: [N, D] float32 or bfloat16, rows may be strided, all of one dtype; weight, bias: [D]
// of that dtype. y may alias x, sum may alias residual.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/op.h"

namespace ming {

struct RmsNormParams {
  const void* x;         // [N, D], row stride x_stride
  const void* residual;  // [N, D], row stride residual_stride, or nullptr
  const void* weight;    // [D]
  void* y;               // [N, D], row stride y_stride
  void* sum;             // [N, D], row stride sum_stride; given exactly when residual is
  int64_t rows, dim;     // N, D
  int64_t x_stride, residual_stride, y_stride, sum_stride;
  float eps;
  bool weight_in_fp32;
  DType dtype;
};

struct LayerNormParams {
  const void* x;       // [N, D], row stride x_stride
  const void* weight;  // [D]
  const void* bias;    // [D]
  void* y;             // [N, D], row stride y_stride
  int64_t rows, dim;
  int64_t x_stride, y_stride;
  float eps;
  DType dtype;
};

MING_OP(rms_norm, RmsNormParams)
MING_OP(layer_norm, LayerNormParams)

}  // namespace ming
