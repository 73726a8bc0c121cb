// Separable resizing with given window tables, and patch extraction for the vision tower.
//
//   resize_u8:      each pass  out = clamp((sum_k weight[k] * in[start + k] + 2^21) >> 22, 0, 255)
//   resize_frames:  each pass  out = sum_k weight[k] * in[start + k] in float32; uint8 results are clamped
//                   (NaN to 0) and rounded half to even once, at the end
//   patchify:       row[c][t][y][x] = (float(pixel * (1/255)) - mean[c]) / std[c], the product in float64
//
// Pictures are dense [T, H, W, C], C = 1..4. The horizontal pass comes first. Every output has `taps`
// weights, all of whose inputs lie inside the picture (the binding checks it).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/op.h"

namespace ming {

struct ResizeAxis {
  const int32_t* start;  // [out], or nullptr: the axis keeps its size and its pass is skipped
  const void* weight;    // [out, taps], int32 (resize_u8) or float32 (resize_frames)
  int64_t taps;
};

struct ResizeParams {
  const void* src;  // [frames, in_h, in_w, channels], uint8 (resize_frames also float32)
  void* dst;        // [frames, out_h, out_w, channels], uint8 (resize_frames also float32)
  void* temp;       // [temp_frames, in_h, out_w, channels], uint8 or float32; where both passes run
  int64_t frames, temp_frames;
  int64_t in_h, in_w, out_h, out_w;
  int channels;
  ResizeAxis x, y;
  DType src_dtype, dst_dtype;
};

struct PatchifyParams {
  const void* src;                // [frames, height, width, 3], uint8 or float32
  float* dst;                     // [ceil(frames/2) * height/14 * width/14, 3*2*14*14]
  int64_t frames, height, width;  // frames 1 (used twice) or even; height, width multiples of 28
  float mean[3], std[3];
  DType src_dtype;
};

MING_CPU_OP(resize_u8, ResizeParams)
MING_CPU_OP(resize_frames, ResizeParams)
MING_OP(patchify, PatchifyParams)

}  // namespace ming
