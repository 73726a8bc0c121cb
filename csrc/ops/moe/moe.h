// Mixture of experts: route -> permute -> grouped gate/up with SwiGLU -> grouped down -> combine.
//
// A "slot" is token * top_k + j: the j-th expert of a token. Slots are sorted by expert once (moe_permute);
// the two grouped products then run every expert over its rows without copying them, reading x through the
// slot numbers and writing the result back in slot order.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/op.h"
#include "ops/gemm/gemm.h"

namespace ming {

enum class RouterKind : int32_t { softmax, grouped_sigmoid };

constexpr int kMaxRouted = 256;  // the most experts of a token, and groups of experts

// logits[t] = x[t] W_r^T in fp32, r = modality[t] (0 where modality is absent); then
//   softmax:          s = softmax(logits); choose the top_k largest s
//   grouped_sigmoid:  s = sigmoid(logits), b = s + bias_r; a group's score is the sum of its two largest b;
//                     choose the top_k largest b among the experts of the topk_group best groups
// w = s[chosen]; if top_k > 1, w /= sum(w) (softmax, if normalize) or sum(w) + 1e-20 (grouped_sigmoid);
// w *= scaling. Ties go to the lower id, NaN scores count as -infinity. The chosen ids are stored in
// ascending order.
//
// On a device a modality without a router is reported and takes router 0. Sums run in an order fixed by H
// within each of the regimes of route_logits.cu: up to 64 rows; more of them in bfloat16; all others. There a
// token's result depends on nothing but that token.
struct MoeRouteParams {
  const void* x;            // [N, H] of `dtype`, row stride x_stride
  const float* routers;     // [R] packed float32 weights of [E, H]
  const float* bias;        // [R, E] for grouped_sigmoid, else nullptr
  const uint8_t* modality;  // [N], values < R, or nullptr
  int32_t* topk_ids;        // [N, top_k]
  float* topk_weights;      // [N, top_k]
  float* logits;            // [N, E]
  int64_t tokens, hidden, x_stride;
  int32_t experts, routers_count, top_k;  // top_k <= kMaxRouted and <= experts in the kept groups
  int32_t n_group, topk_group;  // grouped_sigmoid: n_group <= kMaxRouted divides E, at least two per group
  float scaling;
  DType dtype;
  RouterKind kind;
  bool normalize;
};

// Stable counting sort of the slots by expert. On a device an id outside its range is reported and counts as
// the nearest inside: `rows` names every slot once in any case.
struct MoePermuteParams {
  const int32_t* topk_ids;  // [slots], values < experts
  int32_t* rows;            // [slots], the slot at each place of the grouped order
  int32_t* offsets;         // [experts + 1], an expert's first place
  int64_t slots;
  int32_t experts;
};

// For every place i in [offsets[e], offsets[e + 1]) of the grouped order:
//   grouped_gemm_swiglu:  y[i] = silu(g) * u, where g, u = x[rows[i] / top_k] times gate and up of expert e
//   grouped_gemm_down:    y[rows[i]] = x[i] W_e^T
// Sums as in gemm.h, one rounding. On a device rows and offsets are checked by the kernels: a place outside
// its range is reported and left out.
struct GroupedGemmParams {
  const void* x;           // [tokens, K] or [slots, K], row stride x_stride
  const void* w;           // [experts] packed weights, gated (N outputs) for swiglu
  const int32_t* rows;     // [slots], each slot once
  const int32_t* offsets;  // [experts + 1]
  void* y;                 // [slots, N], row stride y_stride; not x
  int64_t slots, n, k, x_stride, y_stride;
  int32_t experts, top_k;
  DType dtype;
  const void* scales;  // of quantised weights, bfloat16 [experts][row_count(n)][row_scales(k)], else nullptr
  WeightFormat format;
  // Hopper's kernel for many rows per expert runs where this has the bytes of grouped_gemm_workspace(),
  // aligned to 256; without it the general kernels do.
  void* workspace;
  int64_t workspace_bytes;
};

// y[t] = round(sum_j topk_weights[t][j] * expert_out[t * top_k + j]), the sum in fp32 and in the order of j;
// then round(y + shared) where shared is given.
struct MoeCombineParams {
  const void* expert_out;     // [N * top_k, H], contiguous
  const float* topk_weights;  // [N, top_k]
  const void* shared;         // [N, H], row stride shared_stride, or nullptr
  void* y;                    // [N, H], contiguous; may alias shared
  int64_t tokens, hidden, shared_stride;
  int32_t top_k;
  DType dtype;
};

MING_OP(moe_route, MoeRouteParams)
MING_OP(moe_permute, MoePermuteParams)
MING_OP(grouped_gemm_swiglu, GroupedGemmParams)
MING_OP(grouped_gemm_down, GroupedGemmParams)
namespace cuda {
// Bytes of workspace with which Hopper's kernel takes this product; 0 where it cannot run or, unless
// `always`, would not pay.
int64_t grouped_gemm_workspace(const GroupedGemmParams& p, bool gated, bool always);
}  // namespace cuda
MING_OP(moe_combine, MoeCombineParams)

}  // namespace ming
