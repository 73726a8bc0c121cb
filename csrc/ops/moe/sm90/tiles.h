// Block tiles of the Hopper grouped products, and which one a load gets.
//
// Rows x outputs x k:
//   flat  64 x 256 x 64, 5 stages, pingpong: a warpgroup stores while the other multiplies. For few rows per
//         expert: weights are read once, less padding.
//   tall  128 x 256 x 64, 4 stages, cooperative: two warpgroups share a tile. For many rows: half the
//         shared-memory fills per product.
//
// Lite's widths (2816, 2048) and flash's (2048, 4096) are multiples of 256. An expert's last tile is half
// empty on average, so tall tiles waste 64 rows per expert and flat ones 32; from 192 rows per expert the
// halved weight traffic is taken to outweigh that. The limit follows from counted bytes, not from
// measurements.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/gemm/dispatch_policy.hpp>

namespace ming::cuda::sm90 {

struct FlatTile {
  using Shape = cute::Shape<cute::_64, cute::_256, cute::_64>;
  using Schedule = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong;
  static constexpr int kStages = 5;
};

struct TallTile {
  using Shape = cute::Shape<cute::_128, cute::_256, cute::_64>;
  using Schedule = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative;
  static constexpr int kStages = 4;
};

// Whether `slots` rows over `experts` experts (those without rows counted) take the tall tile.
constexpr bool tall_tiles(int64_t slots, int experts) {
  return slots >= 192 * int64_t(experts);
}

}  // namespace ming::cuda::sm90
