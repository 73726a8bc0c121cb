// rope_append: 16 lanes take one head of one token. A piece of a head is 2 * Step values: those that rotate
// with each other, or two runs of those that pass unchanged. With a norm the head is read twice, the second
// time from the cache.
#include <initializer_list>

#include "common/gpu.h"
#include "ops/rope/rope.h"

namespace ming::cuda {
namespace {

using namespace ming::gpu;

constexpr int kThreads = 128;
constexpr int kHeadLanes = 16;
constexpr int kHeads = kThreads / kHeadLanes;  // of a block

__global__ void __launch_bounds__(kThreads) rope_table_kernel(const RopeTableParams p) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= p.tokens * p.freqs) return;
  const int64_t n = at / p.freqs, j = at % p.freqs;
  const int axis = p.axis[j] < 2 ? p.axis[j] : 2;
  float sin, cos;
  sincosf(float(p.positions[axis * p.position_stride + n]) * p.inv_freq[j], &sin, &cos);
  p.cos[at] = cos * p.scale;
  p.sin[at] = sin * p.scale;
}

// The piece of a head that rotates by angles j.. (Step of them), a at j and b at j + F; both may lie in one
// head read and written.
template <int Step>
struct Angles {
  Vec<float, Step> cos, sin;
  __device__ Angles(const float* cos_row, const float* sin_row, int64_t j)
      : cos(load<Step>(cos_row + j)), sin(load<Step>(sin_row + j)) {}
  template <typename T, typename To>
  __device__ void rotate(const Vec<T, Step>& a, const Vec<T, Step>& b, Vec<To, Step>* ra,
                         Vec<To, Step>* rb) const {
#pragma unroll
    for (int i = 0; i < Step; ++i) {
      const float x = to_float(a.at[i]), y = to_float(b.at[i]);
      ra->at[i] = from_float<To>(fmaf(-y, sin.at[i], x * cos.at[i]));
      rb->at[i] = from_float<To>(fmaf(x, sin.at[i], y * cos.at[i]));
    }
  }
};

// How a head of `dim` values falls into pieces, the first 2 * freqs values rotating.
template <int Step>
struct Pieces {
  int dim, freqs, rotating, passing;
  __device__ Pieces(int dim_, int freqs_)
      : dim(dim_),
        freqs(freqs_),
        rotating(freqs_ / Step),
        passing((dim_ - 2 * freqs_ + 2 * Step - 1) / (2 * Step)) {}
  __device__ int count() const { return rotating + passing; }
  // Where the two runs of piece i begin; the second of a passing piece may lie at dim or behind.
  __device__ int2 at(int i) const {
    if (i < rotating) return {i * Step, freqs + i * Step};
    const int first = 2 * freqs + (i - rotating) * Step;
    return {first, first + passing * Step};
  }
};

template <typename T, int Step>
__device__ __forceinline__ float squares(const Vec<T, Step>& v) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < Step; ++i) sum = fmaf(to_float(v.at[i]), to_float(v.at[i]), sum);
  return sum;
}

template <typename T, int Step>
__device__ __forceinline__ void normalise(Vec<T, Step>* v, float scale, const T* weight) {
  const Vec<T, Step> w = load<Step>(weight);
#pragma unroll
  for (int i = 0; i < Step; ++i)
    v->at[i] = from_float<T>(rounded<T>(to_float(v->at[i]) * scale) * to_float(w.at[i]));
}

template <typename T, typename To, int Step>
__device__ __forceinline__ Vec<To, Step> converted(const Vec<T, Step>& v) {
  Vec<To, Step> out;
#pragma unroll
  for (int i = 0; i < Step; ++i) out.at[i] = from_float<To>(to_float(v.at[i]));
  return out;
}

// One head from x to y; `norm` is [D] or nullptr. All lanes of a warp come here, those without a head with
// reads = false; nothing waits for `writes`, which comes from memory, before the values are there.
template <typename T, typename To, int Step>
__device__ __forceinline__ void head(const RopeAppendParams& p, const T* x, To* y, const T* norm, int freqs,
                                     int64_t token, bool reads, bool writes) {
  const int lane = threadIdx.x % kHeadLanes;
  const Pieces<Step> pieces(int(p.head_dim), freqs);
  const int count = reads ? pieces.count() : 0;
  float scale = 0;
  if (p.q_norm) {
    if (norm)
      for (int i = lane; i < count; i += kHeadLanes) {
        const int2 at = pieces.at(i);
        scale += squares(load<Step>(x + at.x));
        if (at.y < pieces.dim) scale += squares(load<Step>(x + at.y));
      }
#pragma unroll
    for (int bits = kHeadLanes / 2; bits > 0; bits >>= 1) scale += __shfl_xor_sync(kAllLanes, scale, bits);
    scale = 1.0f / sqrtf(scale / float(p.head_dim) + p.eps);
  }
  for (int i = lane; i < count; i += kHeadLanes) {
    const int2 at = pieces.at(i);
    const bool both = at.y < pieces.dim;
    Vec<T, Step> a = load<Step>(x + at.x), b = load<Step>(x + (both ? at.y : at.x));
    if (norm) {
      normalise(&a, scale, norm + at.x);
      if (both) normalise(&b, scale, norm + at.y);
    }
    Vec<To, Step> ra, rb;
    if (i < pieces.rotating) {
      const int64_t row = token * p.freqs;
      Angles<Step>(p.cos + row, p.sin + row, at.x).rotate(a, b, &ra, &rb);
    } else {
      ra = converted<T, To>(a);
      rb = converted<T, To>(b);
    }
    if (!writes) continue;
    store(y + at.x, ra);
    if (both) store(y + at.y, rb);
  }
}

template <typename T, typename Page, int Step>
__global__ void __launch_bounds__(kThreads)
    rope_append_kernel(const RopeAppendParams p, DeviceStatus* status) {
  const int64_t token = blockIdx.x, d = p.head_dim;
  const int h = int(blockIdx.y * kHeads + threadIdx.x / kHeadLanes);
  const int heads = int(p.heads), keys = heads + int(p.kv_heads);
  const int64_t slot = p.slots[token];
  const T* x = static_cast<const T*>(p.qkv) + token * p.qkv_stride + h * d;
  const T *q_norm = static_cast<const T*>(p.q_norm), *k_norm = static_cast<const T*>(p.k_norm);
  // q and the pages may differ in dtype: a block with heads of both kinds makes two calls.
  if (int(blockIdx.y * kHeads) < heads)
    head<T, T, Step>(p, x, static_cast<T*>(p.q) + (token * heads + h) * d, q_norm, int(p.freqs), token,
                     h < heads, true);
  if (int((blockIdx.y + 1) * kHeads) <= heads) return;
  const bool inside = slot >= 0 && slot < p.pages * p.page_size;
  if (!inside && slot != -1 && h == heads && threadIdx.x % kHeadLanes == 0) report(status, Fault::slot, slot);
  const bool is_key = h < keys;
  const uint32_t at = inside ? uint32_t(slot) : 0, page_size = uint32_t(p.page_size);
  const int64_t page_head = at / page_size * p.kv_heads + h - (is_key ? heads : keys);
  Page* y = static_cast<Page*>(is_key ? p.k_pages : p.v_pages) + (page_head * page_size + at % page_size) * d;
  head<T, Page, Step>(p, x, y, is_key ? k_norm : nullptr, is_key ? int(p.freqs) : 0, token,
                      h >= heads && h < keys + int(p.kv_heads), inside);
}

// One block per token; each thread takes pieces of all heads.
template <typename T, int Step>
__global__ void __launch_bounds__(kThreads) rope_qk_kernel(const RopeQkParams p) {
  const int64_t token = blockIdx.x, row = token * p.freqs;
  const int pieces = int(p.freqs / Step), count = int(2 * p.heads) * pieces;
  T* qkv = static_cast<T*>(p.qkv) + token * p.qkv_stride;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int j = i % pieces * Step;
    T *a = qkv + i / pieces * p.head_dim + j, *b = a + p.freqs;
    Vec<T, Step> ra, rb;
    Angles<Step>(p.cos + row, p.sin + row, j).rotate(load<Step>(a), load<Step>(b), &ra, &rb);
    store(a, ra);
    store(b, rb);
  }
}

constexpr int kStep = 4;

bool wide_tables(const float* cos, const float* sin, int64_t freqs, int64_t head_dim) {
  return freqs % kStep == 0 && head_dim % kStep == 0 && wide_rows<float>(cos, 0) && wide_rows<float>(sin, 0);
}

bool wide(const RopeAppendParams& p) {
  bool aligned = wide_tables(p.cos, p.sin, p.freqs, p.head_dim);
  for (const void* data : {p.qkv, p.q_norm, p.k_norm, static_cast<const void*>(p.q),
                           static_cast<const void*>(p.k_pages), static_cast<const void*>(p.v_pages)})
    aligned &= wide_rows<float>(data, p.qkv_stride);
  return aligned;
}

template <typename T, typename Page>
void append(const RopeAppendParams& p, Stream stream) {
  const dim3 grid(uint32_t(p.tokens), uint32_t(ceil_div(p.heads + 2 * p.kv_heads, kHeads)));
  if (wide(p))
    MING_LAUNCH((rope_append_kernel<T, Page, kStep>), grid, kThreads, 0, stream, p, device_status());
  else
    MING_LAUNCH((rope_append_kernel<T, Page, 1>), grid, kThreads, 0, stream, p, device_status());
}

}  // namespace

void rope_table(const RopeTableParams& p, Stream stream) {
  MING_LAUNCH(rope_table_kernel, dim3(uint32_t(ceil_div(p.tokens * p.freqs, kThreads))), kThreads, 0, stream,
              p);
}

void rope_append(const RopeAppendParams& p, Stream stream) {
  with_dtype(p.dtype, [&](auto t) {
    with_dtype(p.page_dtype, [&](auto page) { append<decltype(t), decltype(page)>(p, stream); });
  });
}

void rope_qk(const RopeQkParams& p, Stream stream) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const dim3 grid{uint32_t(p.tokens)};
    if (wide_tables(p.cos, p.sin, p.freqs, p.head_dim) && wide_rows<float>(p.qkv, p.qkv_stride))
      MING_LAUNCH((rope_qk_kernel<T, kStep>), grid, kThreads, 0, stream, p);
    else
      MING_LAUNCH((rope_qk_kernel<T, 1>), grid, kThreads, 0, stream, p);
  });
}

}  // namespace ming::cuda
