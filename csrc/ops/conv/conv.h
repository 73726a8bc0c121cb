// The input of a convolution over frames: activated, padded with zeros and laid out so that the convolution
// is one matrix product (`linear`) over windows that overlap in memory.
//
//   y[u % D][u / D][c] = act(scale * sum_i x_i[u - before][c])   for before <= u < before + T
//                        0                                       for the other u < D * R
//
//   act: none; leaky  v, slope * v below 0; snake  v + sin(alpha[c] v)^2 / (alpha[c] + 1e-9)
//
// D is the dilation of the convolution that follows: each of the D phases of the frames is an item of a batch
// by itself, in which the taps lie next to each other. The results of such a convolution are in phases too:
// frame t of x_i is at (t % S) * x_phase_stride + (t / S) * x_frame_stride.
//
// All float32. y does not overlap the inputs.
#pragma once

#include <cstdint>

#include "common/op.h"

namespace ming {

enum class FrameAct : int32_t { none, leaky, snake };

constexpr int kMaxFrameInputs = 3;

struct ConvFramesParams {
  const float* x[kMaxFrameInputs];  // [S, x frames, C] each, all with the same strides
  const float* alpha;               // [C] for snake, else nullptr
  float* y;                         // [D, R, C]
  int64_t inputs;                   // 1..3
  int64_t frames, channels;         // T, C
  int64_t split;                    // S >= 1
  int64_t x_phase_stride, x_frame_stride;
  int64_t before, dilation, rows;  // before + T <= D * R
  float scale, slope;
  FrameAct act;
};

MING_OP(conv_frames, ConvFramesParams)

}  // namespace ming
