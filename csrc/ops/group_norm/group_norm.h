// Normalisation between the convolutions over frames, with what stands next to it there.
//
//   y[b, before + t, c] = round(act((x[b, t, c] - mean) / sqrt(var + eps) * weight[c] + bias[c]) + shift[b,
//   c])
//
// mean and biased var are those of the group of C / G neighbouring channels that c belongs to: over all
// frames of item b (GroupNorm), or per_frame over frame t alone. The other frames of y are zeros, the padding
// of the next convolution. act: none, or mish(x) = x tanh(log(1 + e^x)). Sums are fp32 in an order fixed by
// the shape of one item; an item's result (per_frame: a frame's) depends on nothing else.
//
// x [B, T, C], y [B, P, C] with P >= before + T, shift [B, C]: float32 or bfloat16, all of one dtype, outer
// dimensions may be strided; weight, bias: [C] of that dtype. y does not overlap x.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/op.h"

namespace ming {

struct GroupNormParams {
  const void* x;       // [B, T, C], strides x_item_stride, x_frame_stride
  const void* weight;  // [C]
  const void* bias;    // [C]
  const void* shift;   // [B, C], row stride shift_stride, or nullptr
  void* y;             // [B, P, C], strides y_item_stride, y_frame_stride
  int64_t batch, frames, channels;
  int64_t groups;              // divides channels
  int64_t before, out_frames;  // zeros before each item; P
  int64_t x_item_stride, x_frame_stride, shift_stride, y_item_stride, y_frame_stride;
  float eps;
  bool per_frame, mish;
  DType dtype;
};

MING_OP(group_norm, GroupNormParams)

}  // namespace ming
