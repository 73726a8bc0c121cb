#include <cstring>

#include "common/thread_pool.h"
#include "ops/embed/embed.h"

namespace ming {
namespace MING_ISA {

void embed(const EmbedParams& p) {
  const int64_t size = p.dtype == DType::f32 ? 4 : 2, row = p.hidden * size;
  const char *table = static_cast<const char*>(p.table), *feats = static_cast<const char*>(p.media_feats);
  char* y = static_cast<char*>(p.y);
  parallel_for(p.tokens, grain_of(p.hidden), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t id = p.ids[n] < 0 ? 0 : p.ids[n] < p.vocab ? p.ids[n] : p.vocab - 1;
      std::memcpy(y + n * row, table + id * p.table_stride * size, row);
    }
  });
  parallel_for(p.media, grain_of(p.hidden), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      std::memcpy(y + p.media_rows[m] * row, feats + m * p.feats_stride * size, row);
  });
}

}  // namespace MING_ISA
}  // namespace ming
