#include "common/simd.h"
#include "common/thread_pool.h"
#include "ops/norm/norm.h"

namespace ming {
namespace MING_ISA {
namespace {

// Rows per chunk so that a chunk is worth handing to another thread.
int64_t row_grain(int64_t dim) {
  return 1 + 16384 / (dim + 1);
}

// sum over the row of f(lane vector), in one fixed order
template <typename F>
float row_sum(int64_t dim, F&& at) {
  vf a = vzero(), b = vzero();
  int64_t i = 0;
  for (; i + 2 * VF <= dim; i += 2 * VF) {
    a = a + at(i, VF);
    b = b + at(i + VF, VF);
  }
  for (; i < dim; i += VF) a = a + at(i, dim - i < VF ? int(dim - i) : VF);
  return vsum(a + b);
}

template <typename T>
vf load_n(const T* p, int n) {
  return n == VF ? vload(p) : vload_tail(p, n);
}
template <typename T>
void store_n(T* p, vf v, int n) {
  if (n == VF)
    vstore(p, v);
  else
    vstore_tail(p, v, n);
}

template <typename T>
vf rounded(vf v) {
  T tmp[VF];
  vstore(tmp, v);
  return vload(tmp);
}

template <typename T>
void rms_norm_row(const RmsNormParams& p, int64_t row) {
  const T* z = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* weight = static_cast<const T*>(p.weight);
  T* y = static_cast<T*>(p.y) + row * p.y_stride;
  if (p.residual) {
    const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
    T* sum = static_cast<T*>(p.sum) + row * p.sum_stride;
    for (int64_t i = 0; i < p.dim; i += VF) {
      const int n = p.dim - i < VF ? int(p.dim - i) : VF;
      store_n(sum + i, load_n(z + i, n) + load_n(residual + i, n), n);
    }
    z = sum;
  }
  const float squares = row_sum(p.dim, [&](int64_t i, int n) {
    vf v = load_n(z + i, n);
    return v * v;
  });
  const vf scale = vset(1.0f / std::sqrt(squares / float(p.dim) + p.eps));
  for (int64_t i = 0; i < p.dim; i += VF) {
    const int n = p.dim - i < VF ? int(p.dim - i) : VF;
    vf v = load_n(z + i, n) * scale;
    if (!p.weight_in_fp32) v = rounded<T>(v);
    store_n(y + i, v * load_n(weight + i, n), n);
  }
}

template <typename T>
void layer_norm_row(const LayerNormParams& p, int64_t row) {
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);
  T* y = static_cast<T*>(p.y) + row * p.y_stride;
  const float mean = row_sum(p.dim, [&](int64_t i, int n) { return load_n(x + i, n); }) / float(p.dim);
  const vf centre = vset(mean);
  const float squares = row_sum(p.dim, [&](int64_t i, int n) {
    // Missing tail lanes read as the mean, so that they add nothing.
    vf d = (n == VF ? vload(x + i) : vload_tail(x + i, n, mean)) - centre;
    return d * d;
  });
  const vf scale = vset(1.0f / std::sqrt(squares / float(p.dim) + p.eps));
  for (int64_t i = 0; i < p.dim; i += VF) {
    const int n = p.dim - i < VF ? int(p.dim - i) : VF;
    vf v = (load_n(x + i, n) - centre) * scale;
    store_n(y + i, vfma(v, load_n(weight + i, n), load_n(bias + i, n)), n);
  }
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  parallel_for(p.rows, row_grain(p.dim), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      p.dtype == DType::f32 ? rms_norm_row<float>(p, row) : rms_norm_row<bf16>(p, row);
  });
}

void layer_norm(const LayerNormParams& p) {
  parallel_for(p.rows, row_grain(p.dim), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      p.dtype == DType::f32 ? layer_norm_row<float>(p, row) : layer_norm_row<bf16>(p, row);
  });
}

}  // namespace MING_ISA
}  // namespace ming
