#include "common/device_status.h"
#include "ops/gemm/tile_gemm.h"
#include "ops/gemm/tile_simt.cuh"

namespace ming::cuda {
namespace {

using namespace tile;

struct Groups {
  const int32_t *rows, *offsets;  // [slots], [experts + 1]
  int slots, experts, n_tiles;
  int x_divisor;  // gated: a place reads row slot / x_divisor of x; 0: place i reads row i and writes row
                  // slot
};

struct GroupTile {
  int expert, begin, end;  // its places
  TileIndex at;            // within the expert
};

// Finds block `id` among the tiles of all experts, which follow each other; false for a block too many. Every
// thread of the block calls it.
template <int Threads, int TileM>
__device__ __forceinline__ bool find_tile(const Groups& g, int id, DeviceStatus* status, GroupTile& tile) {
  MING_SHARED(int, warp_tiles, [Threads / 32]);
  MING_SHARED(GroupTile, found, [1]);
  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  const int share = (g.experts + Threads - 1) / Threads, first = t * share;
  const auto places_of = [&](int expert, int& begin, int& end) {
    begin = g.offsets[expert], end = g.offsets[expert + 1];
    if (begin >= 0 && begin <= end && end <= g.slots) return true;
    end = begin;  // nothing of it is computed
    return false;
  };
  const auto tiles_of = [](int begin, int end) { return (end - begin + TileM - 1) / TileM; };

  int tiles = 0;  // of this thread's experts
  for (int e = first, begin, end; e < first + share && e < g.experts; ++e) {
    if (!places_of(e, begin, end)) report(status, Fault::offsets, end);
    tiles += tiles_of(begin, end);
  }
  if (t == 0) {
    if (g.offsets[0] != 0) report(status, Fault::offsets, g.offsets[0]);
    if (g.offsets[g.experts] != g.slots) report(status, Fault::offsets, g.offsets[g.experts]);
    found[0].expert = -1;
  }
  int before = tiles;  // inclusive prefix over the warp
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, before, step);
    if (lane >= step) before += other;
  }
  if (lane == 31) warp_tiles[warp] = before;
  __syncthreads();
  before -= tiles;
  for (int w = 0; w < warp; ++w) before += warp_tiles[w];

  const int tile_row = id / g.n_tiles;  // an expert's blocks are whole rows of n tiles
  if (tile_row >= before && tile_row < before + tiles) {
    for (int e = first, begin, end; e < first + share && e < g.experts; ++e) {
      places_of(e, begin, end);
      const int here = tiles_of(begin, end);
      if (tile_row < before + here) {
        found[0] = {e, begin, end, tile_index(id - before * g.n_tiles, here, g.n_tiles)};
        break;
      }
      before += here;
    }
  }
  __syncthreads();
  tile = found[0];
  return tile.expert >= 0;
}

// Calls run(w, scales, first column, rows, x_row, y_row) for this block's tile.
template <int Threads, int TileM, int TileN, typename Run>
__device__ __forceinline__ void with_group_tile(const Operands& o, const Groups& g, DeviceStatus* status,
                                                Run&& run) {
  MING_SHARED(int, x_rows, [TileM]);
  MING_SHARED(int, y_rows, [TileM]);
  GroupTile tile;
  if (!find_tile<Threads, TileM>(g, blockIdx.x, status, tile)) return;
  const int first = tile.begin + tile.at.m * TileM;
  const int rows = tile.end - first < TileM ? tile.end - first : TileM;
  for (int r = threadIdx.x; r < TileM; r += Threads) {
    const int place = first + r;
    const bool present = r < rows;
    const int slot = present ? g.rows[place] : -1;
    const bool valid = slot >= 0 && slot < g.slots;
    if (present && !valid) report(status, Fault::rows, slot);
    x_rows[r] = !valid ? -1 : g.x_divisor ? slot / g.x_divisor : place;
    y_rows[r] = !valid ? -1 : g.x_divisor ? place : slot;
  }
  __syncthreads();
  const auto x_row = [&](int r) { return int64_t(x_rows[r]); };
  const auto y_row = [&](int r) { return int64_t(y_rows[r]); };
  run(o.w + tile.expert * (o.w_rows * o.w_row_bytes),
      o.scales + (o.scales ? int64_t(tile.expert) * o.w_rows * o.scale_count : 0), tile.at.n * TileN, rows,
      x_row, y_row);
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    grouped_kernel(const Operands o, const Groups g, DeviceStatus* status) {
  with_group_tile<S::kThreads, S::kM, S::kN>(
      o, g, status,
      [&](const unsigned char* w, const bf16* scales, int column, int rows, auto& x_row, auto& y_row) {
        run_tile<S>(o, w, scales, column, rows, x_row, y_row);
      });
}

__global__ void __launch_bounds__(kSimtThreads)
    grouped_simt_kernel(const Operands o, const Groups g, DeviceStatus* status) {
  with_group_tile<kSimtThreads, kSimtM, kSimtN>(
      o, g, status,
      [&](const unsigned char* w, const bf16* scales, int column, int, auto& x_row, auto& y_row) {
        run_simt_tile(o, w, scales, column, x_row, y_row);
      });
}

}  // namespace

void tile_grouped_gemm(const GroupedGemmParams& p, bool gated, Stream stream) {
  if (p.slots == 0 || p.experts == 0) return;
  Output out{};
  out.y = p.y;
  out.y_stride = p.y_stride;
  out.dtype = out.bias_dtype = p.dtype;
  const Operands o = operands(p, gated, out);
  Groups g{p.rows, p.offsets, int(p.slots), p.experts, 0, gated ? p.top_k : 0};
  // The host does not know how the slots are spread: as many tiles as there can be at most, and the choice
  // of the tile goes by the mean.
  const int64_t groups = p.slots < p.experts ? p.slots : p.experts;
  const auto grid = [&](int tile_m, int tile_n) {
    g.n_tiles = int(ceil_div(o.w_rows, tile_n));
    return dim3(uint32_t((p.slots / tile_m + groups) * g.n_tiles));
  };
  if (p.dtype == DType::f32) {
    const dim3 blocks = grid(kSimtM, kSimtN);
    MING_LAUNCH(grouped_simt_kernel, blocks, kSimtThreads, 0, stream, o, g, device_status());
    return;
  }
  with_shape(p.format, groups, ceil_div(p.slots, groups), o.w_rows, [&](auto shape) {
    using S = decltype(shape);
    const dim3 blocks = grid(S::kM, S::kN);
    MING_LAUNCH((grouped_kernel<S>), blocks, S::kThreads, S::kSharedBytes, stream, o, g, device_status());
  });
}

}  // namespace ming::cuda
