// Which kernel takes a product on a CUDA device. The numbers decide speed alone, but also where a row's
// rounding may change: within one regime a row's result depends on nothing but that row.
#pragma once

#include "ops/gemm/gemm.h"
#include "ops/moe/moe.h"

namespace ming::cuda {

// Up to here a weight is streamed row by row, which is bound by memory; a decode step stays in this regime.
constexpr int64_t kFewRows = 32;
// Rows per expert, on average, up to which the experts stream. A busy expert among them takes more passes,
// which find its weights in the cache.
constexpr int64_t kFewExpertRows = 8;
constexpr int64_t kFewSlots = 256;  // the same for few experts: 32 tokens of 8 choices

inline bool streams(const LinearParams& p) {
  return p.m <= kFewRows;
}

inline bool streams(const GroupedGemmParams& p) {
  return p.slots <= kFewSlots || p.slots <= kFewExpertRows * p.experts;
}

// Rows per expert, on average, from which CUTLASS's kernel fills its tiles.
constexpr int64_t kHopperExpertRows = 32;

inline bool fills_hopper_tiles(const GroupedGemmParams& p) {
  return p.dtype == DType::bf16 && p.format == WeightFormat::plain &&
         p.slots >= kHopperExpertRows * p.experts;
}

}  // namespace ming::cuda
