// Bookkeeping between two decode steps, so that they follow each other without the host: every row takes the
// id chosen last as its next input, one position on.
//
//   kv_lens += 1, positions += 1 on all axes
//   slot = page_table[(kv_lens - 1) / page] * page + (kv_lens - 1) % page; a slot of -1 (padding row) stays
//   history[end] = id, end += 1
//
// Rows may share their part of the history if they append the same id at the same place.
#pragma once

#include <cstdint>

#include "common/op.h"

namespace ming {

struct AdvanceParams {
  const int64_t* ids;         // [B]
  int32_t* positions;         // [3, B], row stride positions_stride
  int32_t* kv_lens;           // [B]
  int64_t* slots;             // [B]
  const int32_t* page_table;  // [B, max_pages], row stride page_table_stride
  int64_t* history;           // [L]
  int64_t* history_bounds;    // [B, 2] dense: begin and end in history
  int64_t rows, positions_stride, page_table_stride, max_pages, history_length;
  int32_t page_size;
};

MING_OP(advance, AdvanceParams)

}  // namespace ming
