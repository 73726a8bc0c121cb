// The experts' products on the device: which kernel takes them.
#include "ops/gemm/heuristics.h"
#include "ops/gemm/rows.h"
#include "ops/gemm/tile_gemm.h"
#if !defined(MING_EMU)
#include "ops/moe/sm90/grouped_gemm_sm90.h"
#endif

namespace ming::cuda {
namespace {

void grouped_gemm(const GroupedGemmParams& p, bool gated, Stream stream) {
#if !defined(MING_EMU)
  if (p.workspace_bytes > 0) return grouped_gemm_sm90(p, gated, stream);
#endif
  streams(p) ? rows_grouped_gemm(p, gated, stream) : tile_grouped_gemm(p, gated, stream);
}

}  // namespace

void grouped_gemm_swiglu(const GroupedGemmParams& p, Stream stream) {
  grouped_gemm(p, true, stream);
}

void grouped_gemm_down(const GroupedGemmParams& p, Stream stream) {
  grouped_gemm(p, false, stream);
}

int64_t grouped_gemm_workspace(const GroupedGemmParams& p, bool gated, bool always) {
#if !defined(MING_EMU)
  if ((always || fills_hopper_tiles(p)) && grouped_gemm_sm90_usable(p, gated))
    return int64_t(grouped_gemm_sm90_workspace(p, gated));
#endif
  (void)p, (void)gated, (void)always;
  return 0;
}

}  // namespace ming::cuda
