// The kernels for few rows (rows_stream.cuh).
#pragma once

#include "ops/gemm/gemm.h"
#include "ops/moe/moe.h"

namespace ming::cuda {

void rows_linear(const LinearParams& p, Stream stream);
void rows_grouped_gemm(const GroupedGemmParams& p, bool gated, Stream stream);

}  // namespace ming::cuda
