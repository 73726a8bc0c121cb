// One block per row. A row is read twice, the second time from the cache.
#include "common/gpu.h"
#include "ops/norm/norm.h"

namespace ming::cuda {
namespace {

using namespace ming::gpu;

constexpr int kThreads = 256;

// Visits the row's values, Step consecutive ones per thread and round.
template <int Step, typename F>
__device__ __forceinline__ void over_row(int64_t dim, F&& fn) {
  for (int64_t i = threadIdx.x * Step; i < dim; i += kThreads * Step) fn(i);
}

template <typename T, int Step>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(const RmsNormParams p) {
  MING_SHARED(float, partial, [kThreads / 32]);
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + row * p.residual_stride : nullptr;
  const T* weight = static_cast<const T*>(p.weight);
  T* y = static_cast<T*>(p.y) + row * p.y_stride;
  T* sum = p.sum ? static_cast<T*>(p.sum) + row * p.sum_stride : nullptr;

  float squares = 0;
  over_row<Step>(p.dim, [&](int64_t i) {
    Vec<T, Step> z = load<Step>(x + i);
    if (residual) {
      const Vec<T, Step> r = load<Step>(residual + i);
      for (int j = 0; j < Step; ++j) z.at[j] = from_float<T>(to_float(z.at[j]) + to_float(r.at[j]));
      store(sum + i, z);
    }
    for (int j = 0; j < Step; ++j) squares += to_float(z.at[j]) * to_float(z.at[j]);
  });
  const float scale = 1.0f / sqrtf(block_sum<kThreads>(squares, partial) / float(p.dim) + p.eps);

  // Each thread meets the values it wrote itself: no barrier is needed, and they are still in the cache.
  const T* z_row = residual ? sum : x;
  over_row<Step>(p.dim, [&](int64_t i) {
    const Vec<T, Step> z = load<Step>(z_row + i), w = load<Step>(weight + i);
    Vec<T, Step> out;
    for (int j = 0; j < Step; ++j) {
      const float n = to_float(z.at[j]) * scale;
      out.at[j] = from_float<T>((p.weight_in_fp32 ? n : rounded<T>(n)) * to_float(w.at[j]));
    }
    store(y + i, out);
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) layer_norm_kernel(const LayerNormParams p) {
  MING_SHARED(float, partial, [2][kThreads / 32]);
  const T* x = static_cast<const T*>(p.x) + blockIdx.x * p.x_stride;
  const T *weight = static_cast<const T*>(p.weight), *bias = static_cast<const T*>(p.bias);
  T* y = static_cast<T*>(p.y) + blockIdx.x * p.y_stride;

  float sum = 0;
  over_row<1>(p.dim, [&](int64_t i) { sum += to_float(x[i]); });
  const float mean = block_sum<kThreads>(sum, partial[0]) / float(p.dim);
  float squares = 0;
  over_row<1>(p.dim, [&](int64_t i) { squares += (to_float(x[i]) - mean) * (to_float(x[i]) - mean); });
  const float scale = 1.0f / sqrtf(block_sum<kThreads>(squares, partial[1]) / float(p.dim) + p.eps);
  over_row<1>(p.dim, [&](int64_t i) {
    y[i] = from_float<T>((to_float(x[i]) - mean) * scale * to_float(weight[i]) + to_float(bias[i]));
  });
}

template <typename T>
bool wide(const RmsNormParams& p) {
  return p.dim % kWide<T> == 0 && wide_rows<T>(p.x, p.x_stride) && wide_rows<T>(p.y, p.y_stride) &&
         wide_rows<T>(p.weight, 0) &&
         (!p.residual || (wide_rows<T>(p.residual, p.residual_stride) && wide_rows<T>(p.sum, p.sum_stride)));
}

}  // namespace

void rms_norm(const RmsNormParams& p, Stream stream) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (wide<T>(p))
      MING_LAUNCH((rms_norm_kernel<T, kWide<T>>), dim3(p.rows), kThreads, 0, stream, p);
    else
      MING_LAUNCH((rms_norm_kernel<T, 1>), dim3(p.rows), kThreads, 0, stream, p);
  });
}

void layer_norm(const LayerNormParams& p, Stream stream) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    MING_LAUNCH((layer_norm_kernel<T>), dim3(p.rows), kThreads, 0, stream, p);
  });
}

}  // namespace ming::cuda
