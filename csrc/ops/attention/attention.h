// Scaled dot-product attention with grouped KV heads over contiguous segments or over a paged cache.
//
//   out[i, h] = sum_j softmax_j(scale * q[i, h] . k[j, h / G]) v[j, h / G],   G = Hq / Hkv
//
// Varlen: sequence b is rows [cu_q[b], cu_q[b+1]) of q, k and v; every query sees every key of its segment.
// Paged: sequence b holds kv_lens[b] keys in the pages page_table[b, :]; its queries are its last tokens,
// rows [cu_q[b], cu_q[b+1]) of q, and the query of token t sees keys 0..t. Prefill chunk and decode are the
// same op.
//
// Scores, softmax and accumulation are fp32; with bfloat16 inputs the AVX-512 form multiplies bfloat16 pairs
// and rounds the softmax weights to bfloat16 before the product with v. Keys are taken in spans of kSpan at
// absolute positions 0, kSpan, ..., each with its own maximum; spans are merged in order. Every element is
// summed in an order that depends on key positions only, so a query row has the same bits alone, batched,
// chunked or decoded, whatever the page size and the thread count. Memory of keys at or beyond kv_len is
// never used.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"
#include "common/dtype.h"

namespace ming {

struct AttentionParams {
  const void* q;              // [N, Hq, D]
  const void* k;              // varlen [N, Hkv, D]; paged [P, Hkv, page, D]
  const void* v;              // as k
  void* out;                  // [N, Hq, D]
  const int32_t* cu_q;        // [B + 1] first query row of each sequence
  const int32_t* kv_lens;     // [B], paged only
  const int32_t* page_table;  // [B, maxp], paged only, nullptr means varlen
  int64_t page_table_stride, page_size;
  int64_t q_token_stride, q_head_stride, out_token_stride, out_head_stride;
  int64_t k_page_stride, k_head_stride, k_token_stride;  // page stride: paged only
  int64_t v_page_stride, v_head_stride, v_token_stride;
  int32_t batch, num_heads, num_kv_heads, head_dim;
  float scale;  // > 0
  DType dtype;  // of q, k, v and out
};

MING_CPU_OP(attention, AttentionParams)

}  // namespace ming
