// The many-rows regime of the matrix products: hand-written tile kernels for devices of compute capability
// 8.0 and up. Contracts: gemm.h and moe.h.
//
//   bfloat16 x, plain weights      mma.sync m16n8k16, k in ascending steps of 16
//   bfloat16 x, int8/int4 weights  the same on the integers, exact in bfloat16; the fp32 sum of a group of 64
//                                  is multiplied by its scale and added, groups in ascending order
//   float32 x, every weight        fp32 FMA, k in ascending order
// The order of a sum depends on K and the weight's format alone, not on the tile size chosen: an element of
// the result has the same bits whatever rows are computed with it, dense or grouped.
#pragma once

#include "ops/gemm/gemm.h"
#include "ops/moe/moe.h"

namespace ming::cuda {

void tile_linear(const LinearParams& p, Stream stream);

// gated: grouped_gemm_swiglu, otherwise grouped_gemm_down.
void tile_grouped_gemm(const GroupedGemmParams& p, bool gated, Stream stream);

}  // namespace ming::cuda
