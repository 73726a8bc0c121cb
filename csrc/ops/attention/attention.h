// Scaled dot-product attention with grouped KV heads over contiguous segments or over a paged cache.
//
//   out[i, h] = sum_j softmax_j(scale * (q[i, h] . k[j, h / G] + bias[h, i, j])) v[j, h / G],   G = Hq / Hkv
//
// Varlen: sequence b is rows [cu_q[b], cu_q[b+1]) of q, k and v; every query sees every key of its segment.
// With `keys` it sees rows [keys[b, 0], keys[b, 1]) of k and v instead, which other sequences may see as
// well: chunks of one sequence, each with all that came before it. bias: fp32, varlen only, otherwise 0; j
// counts from the first key that the sequence sees. A row without a key to see, or with a bias of -inf for
// each of them, is zeros. Paged: sequence b holds kv_lens[b] keys in the pages page_table[b, :]; its queries
// are its last tokens, rows [cu_q[b], cu_q[b+1]) of q, and the query of token t sees keys 0..t. Prefill chunk
// and decode are the same op.
//
// Scores, softmax and accumulation are fp32; with bfloat16 inputs the AVX-512 form multiplies bfloat16 pairs
// and rounds the softmax weights to bfloat16 before the product with v. Keys are taken in spans of kSpan at
// absolute positions 0, kSpan, ..., each with its own maximum; spans are merged in order. Every element is
// summed in an order that depends on key positions only, so a query row has the same bits alone, batched,
// chunked or decoded, whatever the page size and the thread count. Memory of keys at or beyond kv_len is
// never used.
//
// CUDA forms. bfloat16 with a head_dim of 64, 80 or 128, 16-byte aligned rows and no bias runs on tensor
// cores: fp32 scores, softmax and sums, softmax weights rounded to bfloat16 for the product with v.
// Everything else runs in fp32 FMA without that rounding. Paged sequences go one of two ways:
//   - up to kFewQueries queries (all sequences, if there are as many as query rows): keys are split at
//     multiples of attention_split_keys(kv_len), each split is one block, splits are merged in order;
//   - more queries: tiles of rows, keys in order from 0.
// Both follow from the sequence, and so do the bits of its rows: they do not depend on other sequences (but
// for a call with as many sequences as rows, one of them longer), the page size or the device's size. Rows
// that go by tiles have the same bits chunked or whole. Nothing is read on the host: a wrong offset, length
// or page is reported (common/device_status.h); a sequence with a wrong length, or with kv_len 0, gives
// zeros, a wrong page counts as keys and values of zero.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/op.h"

namespace ming {

struct AttentionParams {
  const void* q;              // [N, Hq, D]
  const void* k;              // varlen [N, Hkv, D]; paged [P, Hkv, page, D]
  const void* v;              // as k
  void* out;                  // [N, Hq, D]
  const int32_t* cu_q;        // [B + 1] first query row of each sequence
  const int32_t* kv_lens;     // [B], paged only
  const int32_t* page_table;  // [B, maxp], paged only, nullptr means varlen
  const int32_t* keys;        // [B, 2], contiguous, or nullptr; varlen only
  const float* bias;          // [Hq, N, K], rows may overlap, or nullptr; varlen only
  int64_t bias_head_stride, bias_token_stride, bias_keys;  // K
  int64_t key_rows;                                        // of k and v; varlen only
  int64_t page_table_stride, page_size;
  int64_t rows, pages, max_pages;  // N; P and maxp, paged only
  int64_t q_token_stride, q_head_stride, out_token_stride, out_head_stride;
  int64_t k_page_stride, k_head_stride, k_token_stride;  // page stride: paged only
  int64_t v_page_stride, v_head_stride, v_token_stride;
  int32_t batch, num_heads, num_kv_heads, head_dim;
  float scale;      // > 0
  DType dtype;      // of q, k, v and out
  void* workspace;  // CUDA, paged: attention_workspace_bytes, 16-byte aligned; CPU: unused
};

constexpr int kFewQueries = 8;    // of a paged sequence whose keys are split
constexpr int kMaxSplits = 32;    // of a sequence
constexpr int kSplitUnit = 64;    // splits are multiples of it ...
constexpr int kLeastSplit = 128;  // ... from this on

// Keys of each split of a sequence with kv_len keys (the last one may have fewer).
MING_BOTH int64_t attention_split_keys(int64_t kv_len) {
  const int64_t unit = int64_t(kSplitUnit) * kMaxSplits;
  const int64_t keys = (kv_len + unit - 1) / unit * kSplitUnit;
  return keys < kLeastSplit ? kLeastSplit : keys;
}

// Most splits that any sequence of up to `max_keys` keys has.
MING_BOTH int64_t attention_max_splits(int64_t max_keys) {
  const int64_t splits = (max_keys + kLeastSplit - 1) / kLeastSplit;
  return splits < 1 ? 1 : splits > kMaxSplits ? kMaxSplits : splits;
}

// Rows that the split partials of a call have room for.
MING_BOTH int64_t attention_split_rows(int64_t rows, int64_t batch) {
  return rows < kFewQueries * batch ? rows : kFewQueries * batch;
}

// For `rows` query rows of `batch` sequences that may hold up to `max_keys` (maxp * page) keys: maximum, sum
// and output (head_dim rounded up to 4) of each row, head and split.
MING_BOTH int64_t attention_workspace_bytes(int64_t rows, int64_t batch, int64_t heads, int64_t head_dim,
                                            int64_t max_keys) {
  const int64_t splits = attention_max_splits(max_keys);
  if (splits == 1) return 0;
  return attention_split_rows(rows, batch) * heads * splits * ((head_dim + 3) / 4 * 4 + 2) * 4;
}

MING_OP(attention, AttentionParams)

}  // namespace ming
