// BPE audio tokens <-> codec tokens. A BPE id stands for a fixed run of codes, its expansion.
//
//   decode: codes = the expansions of the ids one after the other; ids from V on stand for nothing
//   encode: codes -> alphabet ids; then, while any two neighbours form a known pair, the pair of lowest rank,
//           of those the leftmost, becomes one id. Codes outside the alphabet are dropped first.
//
// Both take rows of one packed array: row b is [cu[b], cu[b + 1]). The codes of one id do not depend on its
// neighbours, so decoding in pieces gives the pieces of the whole.
#pragma once

#include <cstdint>

#include "common/op.h"

namespace ming {

// On a device a negative id, an expansion outside the table and a bad row offset are reported; the id then
// stands for nothing, the offset counts as the nearest inside.
struct AudioBpeDecodeParams {
  const int64_t* ids;     // [N], not negative
  const int32_t* cu_ids;  // [B + 1], rising, within [0, N]
  const int32_t*
      table_offsets;           // [V + 1], rising: id i is table_codes[table_offsets[i], table_offsets[i + 1])
  const int32_t* table_codes;  // [C]
  int32_t* codes;              // [N * longest]; written up to the last code
  int32_t* cu_codes;           // [B + 1], the codes before each row
  int32_t* workspace;          // [audio_bpe_tiles(N)] on a device
  int64_t tokens, rows, vocab, table_size;  // N, B, V, C
  int32_t longest;                          // no expansion has more codes; N * longest < 2^31
};

constexpr int64_t kAudioBpeTile = 1024;  // ids of one block

constexpr int64_t audio_bpe_tiles(int64_t tokens) {
  return tokens > 0 ? (tokens + kAudioBpeTile - 1) / kAudioBpeTile : 1;
}

// On the CPU alone: a prompt is encoded once.
struct AudioBpeEncodeParams {
  const int32_t* codes;        // [N], values < symbols_count
  const int32_t* cu_codes;     // [B + 1], rising from 0 to N
  const int32_t* symbols;      // [symbols_count], the id of each code, -1 outside the alphabet
  const int32_t* pair_starts;  // [V + 1]: pairs with left id l are [pair_starts[l], pair_starts[l + 1])
  const int32_t* pair_right;   // [M], ascending for each left id
  const int32_t* pair_rank;    // [M], no two alike, not negative
  const int32_t* pair_merged;  // [M], ids
  int64_t* ids;                // [N]; written up to the last id
  int32_t* cu_ids;             // [B + 1], the ids before each row
  int64_t rows;
};

MING_OP(audio_bpe_decode, AudioBpeDecodeParams)
MING_CPU_OP(audio_bpe_encode, AudioBpeEncodeParams)

}  // namespace ming
