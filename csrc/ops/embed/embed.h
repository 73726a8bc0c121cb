// Rows of an embedding table, with given features in place of some of them.
//
//   y[n] = table[clamp(ids[n], 0, V - 1)];  then y[media_rows[m]] = media_feats[m]
//
// Ids outside [0, V) are those of media placeholders. On a device a media row outside [0, N) is reported and
// left out.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/op.h"

namespace ming {

struct EmbedParams {
  const int64_t* ids;         // [N]
  const void* table;          // [V, H], row stride table_stride; V >= 1
  const int64_t* media_rows;  // [M], each in [0, N), no two alike
  const void* media_feats;    // [M, H], row stride feats_stride
  void* y;                    // [N, H] dense
  int64_t tokens, vocab, hidden, media, table_stride, feats_stride;
  DType dtype;  // of table, media_feats and y: float32 or bfloat16
};

MING_OP(embed, EmbedParams)

}  // namespace ming
