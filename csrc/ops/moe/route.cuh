// What the two kernels of moe_route share.
#pragma once

#include "common/gpu.h"
#include "ops/moe/moe.h"

namespace ming::cuda {

void route_logits(const MoeRouteParams& p, Stream stream);

// The router of a token; one that does not exist counts as 0.
__device__ __forceinline__ int router_of(const MoeRouteParams& p, int64_t token) {
  const int router = p.modality ? p.modality[token] : 0;
  return router < p.routers_count ? router : 0;
}

}  // namespace ming::cuda
