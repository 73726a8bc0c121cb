#include "common/scratch.h"
#include "common/simd.h"
#include "common/thread_pool.h"
#include "ops/rope/rope.h"

namespace ming {
namespace MING_ISA {
namespace {

constexpr float kMaxAngle = 1e6f;  // beyond it the range reduction below loses its quadrant

// sin and cos of |x| <= kMaxAngle within 2 ulp of 1.
void sincos(vf x, vf* sin, vf* cos) {
  const vf k = vround(x * vset(0.63661977236758134f));
  // pi/2 in three parts; the first subtraction is exact.
  vf r = vfnma(k, vset(1.57079637050628662109375f), x);
  r = vfnma(k, vset(-4.37113900018624283e-8f), r);
  r = vfnma(k, vset(-1.71512451e-15f), r);
  const vf z = r * r;
  vf s = vfma(vset(-1.9515295891e-4f), z, vset(8.3321608736e-3f));
  s = vfma(s, z, vset(-1.6666654611e-1f));
  s = vfma(s * z, r, r);
  vf c = vfma(vset(2.443315711809948e-5f), z, vset(-1.388731625493765e-3f));
  c = vfma(c, z, vset(4.166664568298827e-2f));
  c = vfma(c * z, z, vfma(vset(-0.5f), z, vset(1.0f)));
  // q = k mod 4 in -2..2. Exactly one of the two factors below is zero, the other is 1 or -1.
  const vf q = vfnma(vround(k * vset(0.25f)), vset(4.0f), k);
  const vf size = vmax(q, vzero() - q);
  const vf even = vset(1.0f) - size, odd = q * (vset(2.0f) - size);
  *sin = vfma(s, even, c * odd);
  *cos = vfnma(s, odd, c * even);
}

void table_row(const RopeTableParams& p, const float* weight, int64_t n) {
  const int64_t f = p.freqs;
  const vf pos[3] = {vset(float(p.positions[n])), vset(float(p.positions[n + p.position_stride])),
                     vset(float(p.positions[n + 2 * p.position_stride]))};
  for (int64_t j = 0; j < f; j += VF) {
    const int w = f - j < VF ? int(f - j) : VF;
    // Weights are 0 or 1: this picks the axis of each lane exactly.
    vf at = vload(weight + j) * pos[0];
    at = vfma(vload(weight + f + VF + j), pos[1], at);
    at = vfma(vload(weight + 2 * (f + VF) + j), pos[2], at);
    const vf angle = at * vload_n(p.inv_freq + j, w);
    float* c = p.cos + n * f + j;
    float* s = p.sin + n * f + j;
    // Without a fused multiply-add the range reduction is not exact.
    if (!MING_ISA_AVX2 || vmaxall(vmax(angle, vzero() - angle)) > kMaxAngle) {
      float wide[VF];
      vstore(wide, angle);
      for (int i = 0; i < w; ++i) {
        c[i] = float(std::cos(double(wide[i]))) * p.scale;
        s[i] = float(std::sin(double(wide[i]))) * p.scale;
      }
      continue;
    }
    vf sine, cosine;
    sincos(angle, &sine, &cosine);
    vstore_n(s, sine * vset(p.scale), w);
    vstore_n(c, cosine * vset(p.scale), w);
  }
}

int lanes(int64_t left) {
  return left < VF ? int(left) : VF;
}

// y = round(round(x / sqrt(mean(x^2) + eps)) * weight)
template <typename T>
void head_norm(const T* x, const T* weight, float eps, int64_t dim, T* y) {
  vf sum = vzero();
  for (int64_t i = 0; i < dim; i += VF) {
    const vf v = vload_n(x + i, lanes(dim - i));
    sum = vfma(v, v, sum);
  }
  const vf scale = vset(1.0f / std::sqrt(vsum(sum) / float(dim) + eps));
  for (int64_t i = 0; i < dim; i += VF) {
    const int n = lanes(dim - i);
    vstore_n(y + i, vrounded<T>(vload_n(x + i, n) * scale) * vload_n(weight + i, n), n);
  }
}

// One head; x may equal y.
template <typename T, typename To>
void rotate(const T* x, const float* cos, const float* sin, int64_t freqs, int64_t dim, To* y) {
  for (int64_t j = 0; j < freqs; j += VF) {
    const int n = lanes(freqs - j);
    const vf a = vload_n(x + j, n), b = vload_n(x + freqs + j, n), c = vload_n(cos + j, n),
             s = vload_n(sin + j, n);
    vstore_n(y + j, vfnma(b, s, a * c), n);
    vstore_n(y + freqs + j, vfma(a, s, b * c), n);
  }
  if (static_cast<const void*>(x) == static_cast<void*>(y)) return;
  for (int64_t i = 2 * freqs; i < dim; i += VF) {
    const int n = lanes(dim - i);
    vstore_n(y + i, vload_n(x + i, n), n);
  }
}

template <typename T, typename Page>
void append_token(const RopeAppendParams& p, int64_t n, T* normed) {
  const int64_t d = p.head_dim;
  const T* x = static_cast<const T*>(p.qkv) + n * p.qkv_stride;
  const float *cos = p.cos + n * p.freqs, *sin = p.sin + n * p.freqs;
  T* q = static_cast<T*>(p.q) + n * p.heads * d;
  const bool writes = p.slots[n] >= 0;
  const int64_t slot = writes ? p.slots[n] : 0, page = slot / p.page_size, offset = slot % p.page_size;
  const int64_t first = (page * p.kv_heads * p.page_size + offset) * d;
  Page* k = static_cast<Page*>(p.k_pages) + first;
  Page* v = static_cast<Page*>(p.v_pages) + first;
  for (int64_t h = 0; h < p.heads + (writes ? p.kv_heads : 0); ++h, x += d) {
    const T* from = x;
    if (p.q_norm) {
      head_norm(x, static_cast<const T*>(h < p.heads ? p.q_norm : p.k_norm), p.eps, d, normed);
      from = normed;
    }
    if (h < p.heads)
      rotate(from, cos, sin, p.freqs, d, q + h * d);
    else
      rotate(from, cos, sin, p.freqs, d, k + (h - p.heads) * p.page_size * d);
  }
  for (int64_t h = 0; h < (writes ? p.kv_heads : 0); ++h, x += d)
    for (int64_t i = 0; i < d; i += VF) {
      const int w = lanes(d - i);
      vstore_n(v + h * p.page_size * d + i, vload_n(x + i, w), w);
    }
}

template <typename T, typename Page>
void append(const RopeAppendParams& p) {
  const int64_t width = (p.heads + 2 * p.kv_heads) * p.head_dim;
  parallel_for(p.tokens, grain_of(width), [&](int64_t begin, int64_t end) {
    T* normed = scratch<T>(1, p.head_dim);
    for (int64_t n = begin; n < end; ++n) append_token<T, Page>(p, n, normed);
  });
}

template <typename T>
void rotate_in_place(const RopeQkParams& p) {
  parallel_for(p.tokens, grain_of(2 * p.heads * p.head_dim), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t h = 0; h < 2 * p.heads; ++h) {
        T* x = static_cast<T*>(p.qkv) + n * p.qkv_stride + h * p.head_dim;
        rotate(static_cast<const T*>(x), p.cos + n * p.freqs, p.sin + n * p.freqs, p.freqs, p.head_dim, x);
      }
  });
}

}  // namespace

void rope_table(const RopeTableParams& p) {
  const int64_t row = p.freqs + VF;
  float* weight = scratch<float>(0, 3 * row);
  for (int64_t i = 0; i < 3 * row; ++i)
    weight[i] = i % row < p.freqs && p.axis[i % row] == i / row ? 1.0f : 0.0f;
  parallel_for(p.tokens, grain_of(4 * p.freqs), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) table_row(p, weight, n);
  });
}

void rope_append(const RopeAppendParams& p) {
  if (p.dtype == DType::f32)
    p.page_dtype == DType::f32 ? append<float, float>(p) : append<float, bf16>(p);
  else
    p.page_dtype == DType::f32 ? append<bf16, float>(p) : append<bf16, bf16>(p);
}

void rope_qk(const RopeQkParams& p) {
  p.dtype == DType::f32 ? rotate_in_place<float>(p) : rotate_in_place<bf16>(p);
}

}  // namespace MING_ISA
}  // namespace ming
