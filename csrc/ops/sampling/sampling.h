// Choice of the next token of each row of logits.
//
// Per row, in this order: repetition penalty over the history's ids (negative logits times, others divided by
// it); every id that would complete an n-gram of the history gets -inf; temperature 0 takes the largest
// logit, the lowest id on ties; otherwise logits / temperature, the top_k largest (all ties of the k-th
// included), the smallest set of most likely ids whose probability reaches top_p (ties by ascending id, never
// empty), and the first id, in id order, at which the cumulative probability of what is left exceeds
// `uniform`. Log-probabilities are those of the raw logits. Linear time in V: selection by radix histogram,
// no sort. A row's result depends on that row alone.
//
// A row with NaN or +inf, or without a finite logit after the penalties, gets the id -1 and no other result.
#pragma once

#include <cstdint>

#include "common/op.h"

namespace ming {

struct SampleParams {
  const float* logits;              // [B, V], row stride logits_stride
  const float* temperature;         // [B], >= 0
  const int32_t* top_k;             // [B], 0 = all
  const float* top_p;               // [B], in (0, 1]
  const float* repetition_penalty;  // [B], > 0
  const int32_t* ngram_size;        // [B], 0 = off
  const int64_t* history;           // [L]; ids outside [0, V) only take part in n-gram comparison
  const int64_t* history_bounds;    // [B, 2] dense: begin and end of each row's ids in history
  const float* uniform;             // [B], in [0, 1]
  int64_t* ids;                     // [B], -1 = no choice
  float* logprob;                   // [B]
  int64_t* top_ids;                 // [B, n] dense, most likely first, ties by ascending id
  float* top_logprob;               // [B, n] dense
  int64_t rows, vocab, logits_stride, history_length;
  int32_t num_top;  // n, 0..V
  void* workspace;  // CUDA: sample_workspace_bytes, 16-byte aligned; CPU: unused
};

// Of the CUDA form: per row one flag and one penalised logit per id, and a few numbers per chunk of ids.
constexpr int64_t kSampleChunk = 128;
constexpr int64_t sample_row_bytes(int64_t vocab) {
  const int64_t chunks = (vocab + kSampleChunk - 1) / kSampleChunk;
  return chunks * (5 * kSampleChunk + 32);
}
constexpr int64_t sample_workspace_bytes(int64_t rows, int64_t vocab) {
  return rows * sample_row_bytes(vocab);
}

// banned[id] = 1 for every id that would complete an n-gram already in `history`.
struct NgramBansParams {
  const int64_t* history;  // [L]
  uint8_t* banned;         // [V], zeroed by the caller
  int64_t length, vocab;
  int32_t ngram_size;  // 0 = none
};

MING_OP(sample, SampleParams)
MING_OP(ngram_bans, NgramBansParams)

}  // namespace ming
