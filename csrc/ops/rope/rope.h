// Rotary position embedding: angle tables, rotation fused with the KV append, in-place rotation for vision.
//
// Half-split pairs: with F frequencies, dims j and j + F of the first 2F dims of a head rotate by angle a_j,
//   out[j] = x[j] cos a_j - x[j+F] sin a_j,   out[j+F] = x[j+F] cos a_j + x[j] sin a_j,
// in fp32 with one rounding; dims >= 2F pass unchanged. cos and sin are fp32 [N, F], dense.
//
//   rope_table:   a[n, j] = positions[axis[j], n] * inv_freq[j] (fp32 product); cos and sin of that
//                 angle, within 2 ulp of 1, are both multiplied by `scale`
//   rope_append:  qkv rows hold the heads q (Hq), k (Hkv), v (Hkv). Optional per-head norm of q and k first:
//                 y = round(round(z / sqrt(mean(z^2) + eps)) * weight). Rotated q goes to `q`, rotated k and
//                 plain v to page slot / page, offset slot % page of the caches, in the caches' dtype.
//                 Slot -1 (padding rows): only q is written.
//   rope_qk:      rotates the first 2H of the 3H heads of each row in place.
//
// On a device an axis above 2 counts as 2, and a slot outside the pages is reported and counts as -1.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/op.h"

namespace ming {

struct RopeTableParams {
  const int32_t* positions;  // [3, N], row stride position_stride
  const float* inv_freq;     // [F]
  const uint8_t* axis;       // [F], each 0..2
  float* cos;                // [N, F]
  float* sin;                // [N, F]
  int64_t tokens, freqs, position_stride;
  float scale;
};

struct RopeAppendParams {
  const void* qkv;       // [N, (Hq + 2 Hkv) * D], row stride qkv_stride
  const float* cos;      // [N, F]
  const float* sin;      // [N, F]
  void* k_pages;         // [P, Hkv, page, D] dense, P * page < 2^31
  void* v_pages;         // [P, Hkv, page, D] dense
  const int64_t* slots;  // [N], each in [0, P * page) and no two alike, or -1
  const void* q_norm;    // [D] of dtype, or nullptr; given exactly when k_norm is
  const void* k_norm;    // [D] of dtype, or nullptr
  void* q;               // [N, Hq, D] dense
  int64_t tokens, freqs, heads, kv_heads, head_dim, page_size, pages, qkv_stride;
  float eps;
  DType dtype, page_dtype;  // of qkv, q, norms / of the pages; float32 or bfloat16
};

struct RopeQkParams {
  void* qkv;         // [N, 3 * H * D], row stride qkv_stride
  const float* cos;  // [N, F]
  const float* sin;  // [N, F]
  int64_t tokens, freqs, heads, head_dim, qkv_stride;
  DType dtype;
};

MING_OP(rope_table, RopeTableParams)
MING_OP(rope_append, RopeAppendParams)
MING_OP(rope_qk, RopeQkParams)

}  // namespace ming
