#include "common/scratch.h"
#include "common/simd.h"
#include "common/thread_pool.h"
#include "common/transpose.h"
#include "ops/gemm/gemm.h"
#include "ops/gemm/panel.h"

namespace ming {
namespace MING_ISA {
namespace {

// erf within 4e-7: x P(x^2) / Q(x^2), a rational fit on [-4, 4]; beyond it erf rounds to +-1 in float.
vf verf(vf x) {
  const vf c = vmax(vset(-4.0f), vmin(vset(4.0f), x));
  const vf t = c * c;
  vf p = vset(1.9868125491484534e-6f);
  p = vfma(p, t, vset(2.845597919076681e-4f));
  p = vfma(p, t, vset(3.8831117562949657e-3f));
  p = vfma(p, t, vset(5.3101032972335815e-2f));
  p = vfma(p, t, vset(1.9353976845741272e-1f));
  p = vfma(p, t, vset(1.1283791065216064f));
  vf q = vset(3.7420166336232796e-5f);
  q = vfma(q, t, vset(1.1855129851028323e-3f));
  q = vfma(q, t, vset(1.520678959786892e-2f));
  q = vfma(q, t, vset(1.1534780263900757e-1f));
  q = vfma(q, t, vset(5.048527121543884e-1f));
  q = vfma(q, t, vset(1.0f));
  return c * p / q;
}

vf activate(Act act, vf v) {
  switch (act) {
    case Act::gelu:
      return vset(0.5f) * v * (vset(1.0f) + verf(v * vset(0.70710678118654752f)));
    case Act::silu:
      return vsilu(v);
    case Act::relu:
      return vmax(vzero(), v);  // this operand order keeps NaN
    default:
      return v;
  }
}

// One row of one panel: columns [begin, begin + columns) of y from its 64 sums.
template <typename T, typename O>
void finish_row(const LinearParams& p, int64_t row, int64_t begin, int columns, float* sums) {
  const T* bias = static_cast<const T*>(p.bias);
  O* y = static_cast<O*>(p.y) + row * p.y_stride + begin;
  if (p.gated) {
    if (bias) {
      for (int c = 0; c < columns; ++c) {
        sums[c] += to_float(bias[begin + c]);
        sums[kPanelColumns / 2 + c] += to_float(bias[p.n + begin + c]);
      }
    }
    return store_gated(sums, columns, y);
  }
  const O* residual = static_cast<const O*>(p.residual);
  if (residual) residual += row * p.residual_stride + begin;
  for (int c = 0; c < columns; c += VF) {
    const int n = columns - c;
    vf v = vload(sums + c);
    if (bias) v = v + vload_n(bias + begin + c, n);
    v = activate(p.act, v);
    if (residual) v = vrounded<O>(v) + vload_n(residual + c, n);
    vstore_n(y + c, v, n);
  }
}

template <typename T, typename O>
void linear_typed(const LinearParams& p) {
  const int64_t outputs = panel_outputs(p.gated), panels = panel_count(p.n, p.gated);
  const int64_t block = rows_per_item(p.m, panels, num_threads());
  const int64_t items = panels * ((p.m + block - 1) / block);
  const int64_t size = panel_size(p.dtype, p.k);
  const T* x = static_cast<const T*>(p.x);
  const T* w = static_cast<const T*>(p.w);
  parallel_for(items, item_grain(p.m < block ? p.m : block, p.k), [&](int64_t item, int64_t last) {
    for (; item < last; ++item) {
      const int64_t panel = item % panels, begin = item / panels * block;
      const int64_t end = begin + block < p.m ? begin + block : p.m;
      const int64_t column = panel * outputs;
      const int columns = int(p.n - column < outputs ? p.n - column : outputs);
      panel_rows<T>(
          begin, end, w + panel * size, p.k, [&](int64_t row) { return x + row * p.x_stride; },
          [&](int64_t row, float* sums) { finish_row<T, O>(p, row, column, columns, sums); });
    }
  });
}

}  // namespace

void linear(const LinearParams& p) {
  if (p.dtype == DType::f32)
    p.out_dtype == DType::f32 ? linear_typed<float, float>(p) : linear_typed<float, bf16>(p);
  else
    p.out_dtype == DType::f32 ? linear_typed<bf16, float>(p) : linear_typed<bf16, bf16>(p);
}

// --- packing ---

namespace {

inline vf load_source(const float* p) {
  return vload(p);
}
inline vf load_source(const bf16* p) {
  return vload(p);
}
inline vf load_source(const f16* p) {
#if MING_ISA_AVX512
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
#elif MING_ISA_AVX2
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
#else
  float tmp[VF];
  for (int i = 0; i < VF; ++i) tmp[i] = to_float(p[i]);
  return vload(tmp);
#endif
}

template <typename S, typename T>
void convert(const S* from, T* to, int64_t n) {
  int64_t i = 0;
  for (; i + VF <= n; i += VF) vstore(to + i, load_source(from + i));
  for (; i < n; ++i) to[i] = from_float<T>(to_float(from[i]));
}

// Of 32-bit words: to[i][r] = from[r][i] for r < 64, i < n; n rounded up to VF is readable in `from`.
void transpose_words(const void* from, int64_t stride, void* to, int64_t n) {
  const char* in = static_cast<const char*>(from);
  char* out = static_cast<char*>(to);
  for (int r = 0; r < kPanelColumns; r += VF)
    for (int64_t i = 0; i < n; i += VF) {
      vf t[VF];
      for (int j = 0; j < VF; ++j) std::memcpy(&t[j], in + 4 * ((r + j) * stride + i), sizeof(vf));
      store_transposed(t, out + 4 * (i * kPanelColumns + r), kPanelColumns, n - i);
    }
}

// One panel: rows are converted chunk by chunk into a small buffer and turned from there, so that source and
// packed memory are both touched in order.
template <typename S, typename T>
void pack_panel(const PackParams& p, int64_t panel) {
  constexpr int64_t kChunk = 512 / sizeof(T);  // elements of a row
  constexpr int64_t kWords = 128;              // the same in 32-bit words
  constexpr int64_t kStride = kWords + 16;     // not a power of two: 64 rows would share few cache sets
  constexpr int64_t kPerWord = 4 / sizeof(T);
  T* buffer = scratch<T>(0, kPanelColumns * kStride * kPerWord);
  T* out = static_cast<T*>(p.packed) + panel * panel_size(p.dtype, p.k);
  const int64_t outputs = panel_outputs(p.gated);
  for (int64_t k = 0; k < p.k; k += kChunk) {
    const int64_t count = p.k - k < kChunk ? p.k - k : kChunk;
    const int64_t words = (count + kPerWord - 1) / kPerWord;
    for (int r = 0; r < kPanelColumns; ++r) {
      const int which = r >= outputs;
      const int64_t row = panel * outputs + r - which * outputs;
      T* line = buffer + r * kStride * kPerWord;
      if (row >= p.n) {
        std::memset(line, 0, size_t(words) * 4);
        continue;
      }
      convert(static_cast<const S*>(p.source[which]) + row * p.source_stride[which] + k, line, count);
      if (count % kPerWord) line[count] = T{};
    }
    transpose_words(buffer, kStride, out + k * kPanelColumns, words);
  }
}

template <typename S>
void pack_from(const PackParams& p) {
  parallel_for(panel_count(p.n, p.gated), 1, [&](int64_t panel, int64_t last) {
    for (; panel < last; ++panel)
      p.dtype == DType::f32 ? pack_panel<S, float>(p, panel) : pack_panel<S, bf16>(p, panel);
  });
}

}  // namespace

void pack_weight(const PackParams& p) {
  switch (p.source_dtype) {
    case DType::f32:
      return pack_from<float>(p);
    case DType::bf16:
      return pack_from<bf16>(p);
    default:
      return pack_from<f16>(p);
  }
}

}  // namespace MING_ISA
}  // namespace ming
