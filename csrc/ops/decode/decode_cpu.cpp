#include "ops/decode/decode.h"

namespace ming {
namespace MING_ISA {

void advance(const AdvanceParams& p) {
  for (int64_t b = 0; b < p.rows; ++b) {
    for (int axis = 0; axis < 3; ++axis) ++p.positions[axis * p.positions_stride + b];
    const int32_t at = p.kv_lens[b]++;
    if (p.slots[b] >= 0) {
      const int64_t page = p.page_table[b * p.page_table_stride + at / p.page_size];
      p.slots[b] = page * p.page_size + at % p.page_size;
    }
    p.history[p.history_bounds[2 * b + 1]++] = p.ids[b];
  }
}

}  // namespace MING_ISA
}  // namespace ming
