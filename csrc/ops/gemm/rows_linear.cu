// linear with few rows.
#include "ops/gemm/epilogue.cuh"
#include "ops/gemm/rows.h"
#include "ops/gemm/rows_stream.cuh"

namespace ming::cuda {
namespace {

using namespace ming::gpu;

template <typename T, WeightFormat F, int Rows, bool Wide>
__global__ void __launch_bounds__(kStreamThreads, 2) rows_linear_kernel(const LinearParams p) {
  const bool wide_out = p.out_dtype == DType::f32;
  stream_tile<T, F, Rows, Wide>(
      weight_rows<T, F>(p, p.gated, 0), int64_t(blockIdx.x) * kTileRows, static_cast<const T*>(p.x), p.m, p.k,
      p.gated, [&](int64_t i) { return Source{i * p.x_stride, i}; },
      [&](int64_t row, int64_t column, float sum) {
        wide_out ? finish<T, float>(p, row, column, sum) : finish<T, bf16>(p, row, column, sum);
      },
      [&](int64_t row, int64_t column, float gate, float up) {
        wide_out ? finish_gated<T, float>(p, row, column, gate, up)
                 : finish_gated<T, bf16>(p, row, column, gate, up);
      });
}

}  // namespace

void rows_linear(const LinearParams& p, Stream stream) {
  if (p.m == 0) return;
  const dim3 grid(uint32_t(ceil_div(row_count(p.n, p.gated), kTileRows)));
  with_stream_kernel(p, p.m, [&](auto kernel) {
    using K = decltype(kernel);
    MING_LAUNCH((rows_linear_kernel<typename K::Type, K::kFormat, K::kRows, K::kWideRows>), grid,
                kStreamThreads, 0, stream, p);
  });
}

}  // namespace ming::cuda
