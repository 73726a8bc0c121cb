#include "ops/gemm/tile_gemm.h"
#include "ops/gemm/tile_simt.cuh"

namespace ming::cuda {
namespace {

using namespace tile;

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    linear_kernel(const Operands o, int64_t m, int m_tiles, int n_tiles) {
  const TileIndex at = tile_index(blockIdx.x, m_tiles, n_tiles);
  const int64_t first = int64_t(at.m) * S::kM;
  const int rows = m - first < S::kM ? int(m - first) : S::kM;
  const auto row = [&](int r) { return r < rows ? first + r : int64_t(-1); };
  run_tile<S>(o, o.w, o.scales, at.n * S::kN, rows, row, row);
}

__global__ void __launch_bounds__(kSimtThreads)
    linear_simt_kernel(const Operands o, int64_t m, int m_tiles, int n_tiles) {
  const TileIndex at = tile_index(blockIdx.x, m_tiles, n_tiles);
  const int64_t first = int64_t(at.m) * kSimtM;
  const auto row = [&](int r) { return first + r < m ? first + r : int64_t(-1); };
  run_simt_tile(o, o.w, o.scales, at.n * kSimtN, row, row);
}

}  // namespace

void tile_linear(const LinearParams& p, Stream stream) {
  Output out{};
  out.y = p.y;
  out.residual = p.residual;
  out.bias = p.bias;
  out.y_stride = p.y_stride;
  out.residual_stride = p.residual_stride;
  out.dtype = p.out_dtype;
  out.bias_dtype = p.dtype;
  out.act = p.act;
  const Operands o = operands(p, p.gated, out);
  const auto grid = [&](int tile_m, int tile_n, auto&& launch) {
    const int64_t m_tiles = ceil_div(p.m, tile_m), n_tiles = ceil_div(o.w_rows, tile_n);
    launch(dim3(uint32_t(m_tiles * n_tiles)), int(m_tiles), int(n_tiles));
  };
  if (p.dtype == DType::f32) {
    grid(kSimtM, kSimtN, [&](dim3 blocks, int m_tiles, int n_tiles) {
      MING_LAUNCH(linear_simt_kernel, blocks, kSimtThreads, 0, stream, o, p.m, m_tiles, n_tiles);
    });
    return;
  }
  with_shape(p.format, 1, p.m, o.w_rows, [&](auto shape) {
    using S = decltype(shape);
    grid(S::kM, S::kN, [&](dim3 blocks, int m_tiles, int n_tiles) {
      MING_LAUNCH((linear_kernel<S>), blocks, S::kThreads, S::kSharedBytes, stream, o, p.m, m_tiles, n_tiles);
    });
  });
}

}  // namespace ming::cuda
