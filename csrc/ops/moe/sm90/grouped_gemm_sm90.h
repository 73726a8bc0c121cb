// The grouped products of moe.h for many rows per expert on Hopper (sm_90a): CUTLASS' persistent
// pointer-array kernel (TMA loads, wgmma, bf16 in, fp32 sums) with an epilogue of our own.
//
//   x of a gated product is gathered into grouped order in the workspace first; x of a down product lies so.
//   Group shapes, pointers and strides are made on the device from `offsets`: the host never waits.
//   The epilogue forms silu(gate) * up from neighbouring sums and puts each row where it belongs, so that
//   nothing is computed in a second pass.
//
// Sums run over k in the same order whatever the tile and the group: a row's bits depend on that row alone.
#pragma once

#include <cstddef>

#include "common/op.h"
#include "ops/moe/moe.h"

namespace ming::cuda {

// Whether this product can run here: a Hopper device, bf16, plain "rows" weights, and what TMA and 16-byte
// stores ask for: x, w and y 16-byte aligned, row strides of x and y multiples of 8, k and n multiples of 8.
bool grouped_gemm_sm90_usable(const GroupedGemmParams& p, bool gated);

// Bytes of device memory `p.workspace` must have (256-byte aligned): group tables, tensor maps, gathered x.
size_t grouped_gemm_sm90_workspace(const GroupedGemmParams& p, bool gated);

// `p` must be usable. Throws std::runtime_error where a launch fails or the workspace is too small.
void grouped_gemm_sm90(const GroupedGemmParams& p, bool gated, Stream stream);

}  // namespace ming::cuda
