#include "common/simd.h"
#include "common/thread_pool.h"
#include "ops/norm/norm.h"

namespace ming {
namespace MING_ISA {
namespace {

// The sum over a row of the vectors at(i, elements left), in one fixed order.
template <typename F>
float row_sum(int64_t dim, F&& at) {
  vf a = vzero(), b = vzero();
  int64_t i = 0;
  for (; i + 2 * VF <= dim; i += 2 * VF) {
    a = a + at(i, VF);
    b = b + at(i + VF, VF);
  }
  for (; i < dim; i += VF) a = a + at(i, dim - i);
  return vsum(a + b);
}

template <typename T>
void rms_norm_row(const RmsNormParams& p, int64_t row) {
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* weight = static_cast<const T*>(p.weight);
  T* y = static_cast<T*>(p.y) + row * p.y_stride;
  float squares;
  if (p.residual) {
    const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
    T* sum = static_cast<T*>(p.sum) + row * p.sum_stride;
    squares = row_sum(p.dim, [&](int64_t i, int64_t n) {
      vf v = vrounded<T>(vload_n(x + i, n) + vload_n(residual + i, n));
      vstore_n(sum + i, v, n);
      return v * v;
    });
    x = sum;
  } else {
    squares = row_sum(p.dim, [&](int64_t i, int64_t n) {
      vf v = vload_n(x + i, n);
      return v * v;
    });
  }
  const vf scale = vset(1.0f / std::sqrt(squares / float(p.dim) + p.eps));
  for (int64_t i = 0; i < p.dim; i += VF) {
    const int64_t n = p.dim - i;
    vf v = vload_n(x + i, n) * scale;
    if (!p.weight_in_fp32) v = vrounded<T>(v);
    vstore_n(y + i, v * vload_n(weight + i, n), n);
  }
}

template <typename T>
void layer_norm_row(const LayerNormParams& p, int64_t row) {
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);
  T* y = static_cast<T*>(p.y) + row * p.y_stride;
  const float mean = row_sum(p.dim, [&](int64_t i, int64_t n) { return vload_n(x + i, n); }) / float(p.dim);
  const vf centre = vset(mean);
  const float squares = row_sum(p.dim, [&](int64_t i, int64_t n) {
    // Missing tail lanes read as the mean, so that they add nothing.
    vf d = vload_n(x + i, n, mean) - centre;
    return d * d;
  });
  const vf scale = vset(1.0f / std::sqrt(squares / float(p.dim) + p.eps));
  for (int64_t i = 0; i < p.dim; i += VF) {
    const int64_t n = p.dim - i;
    vf v = (vload_n(x + i, n) - centre) * scale;
    vstore_n(y + i, vfma(v, vload_n(weight + i, n), vload_n(bias + i, n)), n);
  }
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  parallel_for(p.rows, grain_of(p.dim), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      p.dtype == DType::f32 ? rms_norm_row<float>(p, row) : rms_norm_row<bf16>(p, row);
  });
}

void layer_norm(const LayerNormParams& p) {
  parallel_for(p.rows, grain_of(p.dim), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      p.dtype == DType::f32 ? layer_norm_row<float>(p, row) : layer_norm_row<bf16>(p, row);
  });
}

}  // namespace MING_ISA
}  // namespace ming
