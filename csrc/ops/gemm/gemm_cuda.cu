// linear on the device: which kernel takes it, and the epilogue of a library's product.
#include "ops/gemm/epilogue.cuh"
#include "ops/gemm/heuristics.h"
#include "ops/gemm/rows.h"
#include "ops/gemm/tile_gemm.h"

namespace ming::cuda {
namespace {

using namespace ming::gpu;

constexpr int kThreads = 256;

// Step neighbouring outputs per thread.
template <typename T, typename O, int Step>
__global__ void __launch_bounds__(kThreads) epilogue_kernel(const LinearEpilogueParams p) {
  const LinearParams& l = p.linear;
  const int64_t index = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * Step;
  if (index >= l.m * l.n) return;
  const int64_t row = index / l.n, column = index % l.n;
  if (l.gated) {
    const Vec<float, 2 * Step> sums = load<2 * Step>(p.sums + 2 * index);
#pragma unroll
    for (int i = 0; i < Step; ++i) finish_gated<T, O>(l, row, column + i, sums.at[2 * i], sums.at[2 * i + 1]);
  } else {
    const Vec<float, Step> sums = load<Step>(p.sums + index);
#pragma unroll
    for (int i = 0; i < Step; ++i) finish<T, O>(l, row, column + i, sums.at[i]);
  }
}

}  // namespace

void linear(const LinearParams& p, Stream stream) {
  streams(p) ? rows_linear(p, stream) : tile_linear(p, stream);
}

void linear_epilogue(const LinearEpilogueParams& p, Stream stream) {
  const LinearParams& l = p.linear;
  const auto launch = [&](auto kernel, int step) {
    MING_LAUNCH(kernel, dim3(uint32_t(ceil_div(l.m * l.n, kThreads * step))), kThreads, 0, stream, p);
  };
  with_dtype(l.dtype, [&](auto t) {
    with_dtype(l.out_dtype, [&](auto o) {
      using T = decltype(t);
      using O = decltype(o);
      if (l.n % 2 == 0)
        launch(epilogue_kernel<T, O, 2>, 2);
      else
        launch(epilogue_kernel<T, O, 1>, 1);
    });
  });
}

}  // namespace ming::cuda
