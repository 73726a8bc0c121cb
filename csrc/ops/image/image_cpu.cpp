#include "common/scratch.h"
#include "common/simd.h"
#include "common/thread_pool.h"
#include "common/transpose.h"
#include "ops/image/image.h"

namespace ming {
namespace MING_ISA {
namespace {

// Sixteen accumulators, one per row of a tile or per value of an output row: mac() adds weight * 16 inputs,
// store() writes what the pass leaves behind.
constexpr int L = 16;

#if MING_ISA_AVX512

inline __m512i bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m512 values(const uint8_t* p) {
  return _mm512_cvtepi32_ps(bytes(p));
}
inline __m512 values(const float* p) {
  return _mm512_loadu_ps(p);
}

struct Ints {
  __m512i v;
  void clear() { v = _mm512_set1_epi32(1 << 21); }
  void mac(const uint8_t* p, int32_t w) {
    v = _mm512_add_epi32(v, _mm512_mullo_epi32(bytes(p), _mm512_set1_epi32(w)));
  }
  void store(uint8_t* to) const {
    __m512i x = _mm512_max_epi32(_mm512_srai_epi32(v, 22), _mm512_setzero_si512());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtusepi32_epi8(x));
  }
};

struct Floats {
  __m512 v;
  void clear() { v = _mm512_setzero_ps(); }
  template <typename T>
  void mac(const T* p, float w) {
    v = _mm512_fmadd_ps(values(p), _mm512_set1_ps(w), v);
  }
  void store(float* to) const { _mm512_storeu_ps(to, v); }
  void store(uint8_t* to) const {
    __m512i x = _mm512_cvtps_epi32(_mm512_max_ps(v, _mm512_setzero_ps()));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtusepi32_epi8(x));
  }
};

#elif MING_ISA_AVX2

inline __m256i bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline __m256 values(const uint8_t* p) {
  return _mm256_cvtepi32_ps(bytes(p));
}
inline __m256 values(const float* p) {
  return _mm256_loadu_ps(p);
}
inline void store_bytes(uint8_t* to, __m256i a, __m256i b) {
  __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
  __m128i x = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), x);
}

struct Ints {
  __m256i a, b;
  void clear() { a = b = _mm256_set1_epi32(1 << 21); }
  void mac(const uint8_t* p, int32_t w) {
    const __m256i weight = _mm256_set1_epi32(w);
    a = _mm256_add_epi32(a, _mm256_mullo_epi32(bytes(p), weight));
    b = _mm256_add_epi32(b, _mm256_mullo_epi32(bytes(p + 8), weight));
  }
  void store(uint8_t* to) const { store_bytes(to, _mm256_srai_epi32(a, 22), _mm256_srai_epi32(b, 22)); }
};

struct Floats {
  __m256 a, b;
  void clear() { a = b = _mm256_setzero_ps(); }
  template <typename T>
  void mac(const T* p, float w) {
    const __m256 weight = _mm256_set1_ps(w);
    a = _mm256_fmadd_ps(values(p), weight, a);
    b = _mm256_fmadd_ps(values(p + 8), weight, b);
  }
  void store(float* to) const {
    _mm256_storeu_ps(to, a);
    _mm256_storeu_ps(to + 8, b);
  }
  void store(uint8_t* to) const { store_bytes(to, rounded(a), rounded(b)); }
  // Clamped first: out of int32's range the conversion would give its minimum. NaN becomes 0.
  static __m256i rounded(__m256 v) {
    return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(v, _mm256_setzero_ps()), _mm256_set1_ps(255.0f)));
  }
};

#else

struct Ints {
  int32_t v[L];
  void clear() {
    for (int i = 0; i < L; ++i) v[i] = 1 << 21;
  }
  void mac(const uint8_t* p, int32_t w) {
    for (int i = 0; i < L; ++i) v[i] += p[i] * w;
  }
  void store(uint8_t* to) const {
    for (int i = 0; i < L; ++i) {
      const int32_t x = v[i] >> 22;
      to[i] = uint8_t(x < 0 ? 0 : x > 255 ? 255 : x);
    }
  }
};

struct Floats {
  float v[L];
  void clear() {
    for (int i = 0; i < L; ++i) v[i] = 0.0f;
  }
  template <typename T>
  void mac(const T* p, float w) {
    for (int i = 0; i < L; ++i) v[i] += float(p[i]) * w;
  }
  void store(float* to) const { std::memcpy(to, v, sizeof(v)); }
  void store(uint8_t* to) const {
    for (int i = 0; i < L; ++i) {
      const float x = !(v[i] > 0.0f) ? 0.0f : v[i] > 255.0f ? 255.0f : v[i];  // NaN becomes 0
      to[i] = uint8_t(int32_t((x + 12582912.0f) - 12582912.0f));  // 1.5 * 2^23: rounds half to even
    }
  }
};

#endif

template <typename A>
struct WeightOf {
  using type = float;
};
template <>
struct WeightOf<Ints> {
  using type = int32_t;
};

template <typename A, int C, typename S, typename D>
void convolve_tile(const S* tile, const ResizeAxis& axis, int64_t outputs, D* out) {
  const auto* weight = static_cast<const typename WeightOf<A>::type*>(axis.weight);
  for (int64_t x = 0; x < outputs; ++x, weight += axis.taps) {
    const S* s = tile + int64_t(axis.start[x]) * (C * L);
    A acc[C];
    for (int c = 0; c < C; ++c) acc[c].clear();
    for (int64_t k = 0; k < axis.taps; ++k, s += C * L)
      for (int c = 0; c < C; ++c) acc[c].mac(s + c * L, weight[k]);
    for (int c = 0; c < C; ++c) acc[c].store(out + (x * C + c) * L);
  }
}

// Horizontal pass over `rows` rows of in_w pixels: L rows at a time, one lane per row.
template <typename A, int C, typename S, typename D>
void horizontal(const S* src, D* dst, int64_t rows, const ResizeParams& p) {
  const int64_t in = p.in_w * C, out = p.out_w * C;
  parallel_for((rows + L - 1) / L, 1, [&](int64_t begin, int64_t end) {
    S* tile = scratch<S>(0, in * L);
    D* result = scratch<D>(1, out * L);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * L;
      const int count = rows - first < L ? int(rows - first) : L;
      const S* row[L];
      for (int r = 0; r < L; ++r) row[r] = src + (first + (r < count ? r : 0)) * in;
      rows_to_tile<L>(row, in, tile);
      convolve_tile<A, C>(tile, p.x, p.out_w, result);
      tile_to_rows<L>(result, out, count, dst + first * out, out);
    }
  });
}

// N vectors of one output row; `from` is the first tap's row
template <typename A, int N, typename S, typename W, typename D>
inline void column_block(const S* from, int64_t stride, const W* weight, int64_t taps, D* to) {
  A acc[N];
  for (int n = 0; n < N; ++n) acc[n].clear();
  for (int64_t k = 0; k < taps; ++k, from += stride)
    for (int n = 0; n < N; ++n) acc[n].mac(from + n * L, weight[k]);
  for (int n = 0; n < N; ++n) acc[n].store(to + n * L);
}

// Vertical pass of `frames` frames from in_h to out_h rows of `width` values.
template <typename A, typename S, typename D>
void vertical(const S* src, D* dst, int64_t frames, int64_t width, const ResizeParams& p) {
  using Weight = typename WeightOf<A>::type;
  const int64_t taps = p.y.taps;
  parallel_for(frames * p.out_h, grain_of(width * taps / 4), [&](int64_t begin, int64_t end) {
    // Rows shorter than one vector are computed in a padded copy.
    S* narrow = width < L ? scratch<S>(0, taps * L) : nullptr;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t frame = i / p.out_h, y = i % p.out_h;
      const S* from = src + (frame * p.in_h + p.y.start[y]) * width;
      const Weight* weight = static_cast<const Weight*>(p.y.weight) + y * taps;
      D* to = dst + i * width;
      if (narrow) {
        D padded[L];
        std::memset(narrow, 0, taps * L * sizeof(S));
        for (int64_t k = 0; k < taps; ++k) std::memcpy(narrow + k * L, from + k * width, width * sizeof(S));
        column_block<A, 1>(narrow, L, weight, taps, padded);
        std::memcpy(to, padded, width * sizeof(D));
        continue;
      }
      int64_t x = 0;
      for (; x + 4 * L <= width; x += 4 * L) column_block<A, 4>(from + x, width, weight, taps, to + x);
      for (; x + L <= width; x += L) column_block<A, 1>(from + x, width, weight, taps, to + x);
      if (x < width) column_block<A, 1>(from + width - L, width, weight, taps, to + width - L);
    }
  });
}

template <typename A, typename S, typename D>
void horizontal(const S* src, D* dst, int64_t rows, const ResizeParams& p) {
  switch (p.channels) {
    case 1:
      return horizontal<A, 1>(src, dst, rows, p);
    case 2:
      return horizontal<A, 2>(src, dst, rows, p);
    case 3:
      return horizontal<A, 3>(src, dst, rows, p);
    default:
      return horizontal<A, 4>(src, dst, rows, p);
  }
}

template <typename S, typename D>
void resize_float(const ResizeParams& p) {
  const S* src = static_cast<const S*>(p.src);
  D* dst = static_cast<D*>(p.dst);
  float* temp = static_cast<float*>(p.temp);
  const int64_t width = p.out_w * p.channels;
  for (int64_t first = 0; first < p.frames; first += p.temp_frames) {
    const int64_t n = p.frames - first < p.temp_frames ? p.frames - first : p.temp_frames;
    horizontal<Floats>(src + first * p.in_h * p.in_w * p.channels, temp, n * p.in_h, p);
    vertical<Floats>(temp, dst + first * p.out_h * width, n, width, p);
  }
}

constexpr int kPatch = 14, kCell = 28, kPlane = kPatch * kPatch;

struct ByteLevels {
  float value[3][256];
};

inline float level(const ByteLevels& levels, const PatchifyParams&, int c, uint8_t pixel) {
  return levels.value[c][pixel];
}
inline float level(const ByteLevels&, const PatchifyParams& p, int c, float pixel) {
  return (float(double(pixel) * (1.0 / 255.0)) - p.mean[c]) / p.std[c];
}

template <typename S>
void patchify_as(const PatchifyParams& p) {
  ByteLevels levels;
  for (int c = 0; c < 3; ++c)
    for (int v = 0; v < 256; ++v) levels.value[c][v] = level(levels, p, c, float(v));
  const int64_t cell_rows = p.height / kCell, cell_columns = p.width / kCell, frame = p.height * p.width * 3;
  const int times = p.frames == 1 ? 1 : 2;
  parallel_for((p.frames + 1) / 2 * cell_rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / cell_rows, cell_row = i % cell_rows;
      const S* src = static_cast<const S*>(p.src) + block * 2 * frame;
      float* row = p.dst + i * cell_columns * (4 * 6 * kPlane);
      for (int64_t patch = 0; patch < cell_columns * 4; ++patch, row += 6 * kPlane) {
        const int64_t y0 = cell_row * kCell + (patch >> 1 & 1) * kPatch;
        const int64_t x0 = (patch >> 2) * kCell + (patch & 1) * kPatch;
        for (int t = 0; t < times; ++t)
          for (int y = 0; y < kPatch; ++y) {
            const S* s = src + t * frame + ((y0 + y) * p.width + x0) * 3;
            float* to = row + t * kPlane + y * kPatch;
            for (int c = 0; c < 3; ++c)
              for (int x = 0; x < kPatch; ++x) to[c * 2 * kPlane + x] = level(levels, p, c, s[3 * x + c]);
          }
        if (times == 1)
          for (int c = 0; c < 3; ++c)
            std::memcpy(row + (2 * c + 1) * kPlane, row + 2 * c * kPlane, kPlane * sizeof(float));
      }
    }
  });
}

}  // namespace

void resize_u8(const ResizeParams& p) {
  const uint8_t* src = static_cast<const uint8_t*>(p.src);
  uint8_t* dst = static_cast<uint8_t*>(p.dst);
  const int64_t width = p.out_w * p.channels;
  if (!p.y.start) return horizontal<Ints>(src, dst, p.in_h, p);
  if (p.x.start) {
    uint8_t* temp = static_cast<uint8_t*>(p.temp);
    horizontal<Ints>(src, temp, p.in_h, p);
    src = temp;
  }
  vertical<Ints>(src, dst, 1, width, p);
}

void resize_frames(const ResizeParams& p) {
  const bool bytes_in = p.src_dtype == DType::u8, bytes_out = p.dst_dtype == DType::u8;
  if (bytes_in)
    bytes_out ? resize_float<uint8_t, uint8_t>(p) : resize_float<uint8_t, float>(p);
  else
    bytes_out ? resize_float<float, uint8_t>(p) : resize_float<float, float>(p);
}

void patchify(const PatchifyParams& p) {
  p.src_dtype == DType::u8 ? patchify_as<uint8_t>(p) : patchify_as<float>(p);
}

}  // namespace MING_ISA
}  // namespace ming
