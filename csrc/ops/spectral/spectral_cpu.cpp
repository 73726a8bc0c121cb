#include "common/scratch.h"
#include "common/simd.h"
#include "common/thread_pool.h"
#include "common/transpose.h"
#include "ops/spectral/spectral.h"

namespace ming {
namespace MING_ISA {
namespace {

constexpr int kFrame = 400, kHop = 160;

// VD frames are transformed at once, one per lane: the DFT below is plain scalar code over vectors. It runs
// in float64, because bands far below the loudest one would drown in float32's rounding of that one.
#if MING_ISA_AVX512
constexpr int VD = 8;
struct vd {
  __m512d v;
};
inline vd dset(double x) {
  return {_mm512_set1_pd(x)};
}
inline vd dload(const double* p) {
  return {_mm512_loadu_pd(p)};
}
inline vd dload(const float* p) {
  return {_mm512_cvtps_pd(_mm256_loadu_ps(p))};
}
inline void dstore(double* p, vd a) {
  _mm512_storeu_pd(p, a.v);
}
inline void dstore(float* p, vd a) {
  _mm256_storeu_ps(p, _mm512_cvtpd_ps(a.v));
}
inline vd operator+(vd a, vd b) {
  return {_mm512_add_pd(a.v, b.v)};
}
inline vd operator-(vd a, vd b) {
  return {_mm512_sub_pd(a.v, b.v)};
}
inline vd operator*(vd a, vd b) {
  return {_mm512_mul_pd(a.v, b.v)};
}
inline vd dfma(vd a, vd b, vd c) {
  return {_mm512_fmadd_pd(a.v, b.v, c.v)};
}
inline vd dfnma(vd a, vd b, vd c) {
  return {_mm512_fnmadd_pd(a.v, b.v, c.v)};
}
#elif MING_ISA_AVX2
constexpr int VD = 4;
struct vd {
  __m256d v;
};
inline vd dset(double x) {
  return {_mm256_set1_pd(x)};
}
inline vd dload(const double* p) {
  return {_mm256_loadu_pd(p)};
}
inline vd dload(const float* p) {
  return {_mm256_cvtps_pd(_mm_loadu_ps(p))};
}
inline void dstore(double* p, vd a) {
  _mm256_storeu_pd(p, a.v);
}
inline void dstore(float* p, vd a) {
  _mm_storeu_ps(p, _mm256_cvtpd_ps(a.v));
}
inline vd operator+(vd a, vd b) {
  return {_mm256_add_pd(a.v, b.v)};
}
inline vd operator-(vd a, vd b) {
  return {_mm256_sub_pd(a.v, b.v)};
}
inline vd operator*(vd a, vd b) {
  return {_mm256_mul_pd(a.v, b.v)};
}
inline vd dfma(vd a, vd b, vd c) {
  return {_mm256_fmadd_pd(a.v, b.v, c.v)};
}
inline vd dfnma(vd a, vd b, vd c) {
  return {_mm256_fnmadd_pd(a.v, b.v, c.v)};
}
#else
constexpr int VD = 4;
struct vd {
  double v[VD];
};
#define MING_LANES(expr)                        \
  vd r;                                         \
  for (int i = 0; i < VD; ++i) r.v[i] = (expr); \
  return r
inline vd dset(double x) {
  MING_LANES(x);
}
template <typename T>
inline vd dload(const T* p) {
  MING_LANES(p[i]);
}
template <typename T>
inline void dstore(T* p, vd a) {
  for (int i = 0; i < VD; ++i) p[i] = T(a.v[i]);
}
inline vd operator+(vd a, vd b) {
  MING_LANES(a.v[i] + b.v[i]);
}
inline vd operator-(vd a, vd b) {
  MING_LANES(a.v[i] - b.v[i]);
}
inline vd operator*(vd a, vd b) {
  MING_LANES(a.v[i] * b.v[i]);
}
inline vd dfma(vd a, vd b, vd c) {
  MING_LANES(a.v[i] * b.v[i] + c.v[i]);
}
inline vd dfnma(vd a, vd b, vd c) {
  MING_LANES(c.v[i] - a.v[i] * b.v[i]);
}
#undef MING_LANES
#endif

// A complex value is two consecutive vectors (real, imaginary).
struct Complex {
  vd re, im;
};
inline Complex get(const double* buffer, int64_t i) {
  return {dload(buffer + 2 * i * VD), dload(buffer + (2 * i + 1) * VD)};
}
inline void put(double* buffer, int64_t i, Complex z) {
  dstore(buffer + 2 * i * VD, z.re);
  dstore(buffer + (2 * i + 1) * VD, z.im);
}
inline Complex operator+(Complex a, Complex b) {
  return {a.re + b.re, a.im + b.im};
}
inline Complex operator-(Complex a, Complex b) {
  return {a.re - b.re, a.im - b.im};
}
// a - i b
inline Complex minus_i(Complex a, Complex b) {
  return {a.re + b.im, a.im - b.re};
}
// a + i b
inline Complex plus_i(Complex a, Complex b) {
  return {a.re - b.im, a.im + b.re};
}
// k a + plus
inline Complex scaled(Complex a, double k, Complex plus) {
  return {dfma(a.re, dset(k), plus.re), dfma(a.im, dset(k), plus.im)};
}
inline Complex scaled(Complex a, double k) {
  return {a.re * dset(k), a.im * dset(k)};
}
inline Complex times(Complex a, const double* w) {
  const vd c = dset(w[0]), s = dset(w[1]);
  return {dfnma(a.im, s, a.re * c), dfma(a.im, c, a.re * s)};
}

// In place: y_j = sum_k x_k e^(-2 pi i j k / R)
template <int R>
inline void butterfly(Complex* x) {
  if constexpr (R == 2) {
    const Complex a = x[0], b = x[1];
    x[0] = a + b;
    x[1] = a - b;
  } else if constexpr (R == 4) {
    const Complex a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = x[1] - x[3];
    x[0] = a + c;
    x[1] = minus_i(b, d);
    x[2] = a - c;
    x[3] = plus_i(b, d);
  } else {
    static_assert(R == 5);
    constexpr double c1 = 0.30901699437494745, c2 = -0.8090169943749475;
    constexpr double s1 = 0.9510565162951535, s2 = 0.5877852522924731;
    const Complex a1 = x[1] + x[4], b1 = x[1] - x[4], a2 = x[2] + x[3], b2 = x[2] - x[3];
    const Complex m1 = scaled(a2, c2, scaled(a1, c1, x[0])), m2 = scaled(a2, c1, scaled(a1, c2, x[0]));
    const Complex n1 = scaled(b2, s2, scaled(b1, s1)), n2 = scaled(b2, -s1, scaled(b1, s2));
    x[0] = x[0] + a1 + a2;
    x[1] = minus_i(m1, n1);
    x[4] = plus_i(m1, n1);
    x[2] = minus_i(m2, n2);
    x[3] = plus_i(m2, n2);
  }
}

// One pass of the Stockham (self-sorting) transform of M points: `n` points are left, `s` = M / n.
// twiddle holds the 2M-th roots of unity.
template <int R>
void fft_pass(const double* in, double* out, int n, int s, const double* twiddle) {
  const int m = n / R;
  for (int p = 0; p < m; ++p)
    for (int q = 0; q < s; ++q) {
      Complex x[R];
      for (int k = 0; k < R; ++k) x[k] = get(in, q + s * (p + m * k));
      butterfly<R>(x);
      put(out, q + s * R * p, x[0]);
      for (int j = 1; j < R; ++j) put(out, q + s * (R * p + j), times(x[j], twiddle + 4 * p * j * s));
    }
}

// The transforms of 200 and 256 complex points; the result ends in `a`.
template <int M>
void fft(double* a, double* b, const double* twiddle) {
  if constexpr (M == 200) {
    fft_pass<5>(a, b, 200, 1, twiddle);
    fft_pass<5>(b, a, 40, 5, twiddle);
    fft_pass<4>(a, b, 8, 25, twiddle);
    fft_pass<2>(b, a, 2, 100, twiddle);
  } else {
    static_assert(M == 256);
    fft_pass<4>(a, b, 256, 1, twiddle);
    fft_pass<4>(b, a, 64, 4, twiddle);
    fft_pass<4>(a, b, 16, 16, twiddle);
    fft_pass<4>(b, a, 4, 64, twiddle);
  }
}

inline vd norm2(Complex z) {
  return dfma(z.re, z.re, z.im * z.im);
}

// |DFT|^2 of 2M real points from the M-point transform z of (even, odd) pairs; power: [M + 1][VF], of which
// VD lanes are written.
template <int M>
void real_power(const double* z, const double* twiddle, float* power) {
  const Complex z0 = get(z, 0);
  const vd first = z0.re + z0.im, last = z0.re - z0.im;
  dstore(power, first * first);
  dstore(power + M * VF, last * last);
  for (int k = 1; k <= M / 2; ++k) {
    const Complex a = get(z, k), b = get(z, M - k), c = {b.re, dset(0.0) - b.im};
    const Complex even = scaled(a + c, 0.5), d = scaled(a - c, 0.5), odd = {d.im, dset(0.0) - d.re};
    const Complex turned = times(odd, twiddle + 2 * k);
    dstore(power + k * VF, norm2(even + turned));
    dstore(power + (M - k) * VF, norm2(even - turned));
  }
}

// Natural logarithm in place, within 2 ulp, of positive normal numbers; written for the auto-vectoriser.
void log_array(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    int32_t u;
    std::memcpy(&u, &x[i], 4);
    const int32_t e = (u - 0x3f3504f3) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
    const uint32_t bits = uint32_t(u) - (uint32_t(e) << 23);
    float r;
    std::memcpy(&r, &bits, 4);
    r -= 1.0f;
    float q = 7.0376836292e-2f;
    q = q * r - 1.1514610310e-1f;
    q = q * r + 1.1676998740e-1f;
    q = q * r - 1.2420140846e-1f;
    q = q * r + 1.4249322787e-1f;
    q = q * r - 1.6668057665e-1f;
    q = q * r + 2.0000714765e-1f;
    q = q * r - 2.4999993993e-1f;
    q = q * r + 3.3333331174e-1f;
    const float exponent = float(e), square = r * r;
    const float low = q * r * square + exponent * -2.12194440e-4f - 0.5f * square;
    x[i] = (low + r) + exponent * 0.693359375f;
  }
}

// First and last+1 bin of every filter.
void filter_ranges(const float* filters, int64_t mels, int bins, int32_t* range) {
  for (int64_t m = 0; m < mels; ++m) {
    const float* filter = filters + m * bins;
    int lo = 0, hi = bins;
    while (lo < hi && filter[lo] == 0.0f) ++lo;
    while (hi > lo && filter[hi - 1] == 0.0f) --hi;
    range[2 * m] = lo;
    range[2 * m + 1] = hi;
  }
}

// The mean-free, pre-emphasised frame, in place; x: [400][VD]
void emphasise(double* x) {
  vd sum = dset(0.0);
  for (int i = 0; i < kFrame; ++i) sum = sum + dload(x + i * VD);
  const vd mean = sum * dset(1.0 / kFrame);
  vd current = dload(x + (kFrame - 1) * VD) - mean;
  for (int i = kFrame - 1; i >= 0; --i) {
    const vd before = i > 0 ? dload(x + (i - 1) * VD) - mean : current;
    dstore(x + i * VD, dfnma(dset(0.97), before, current));
    current = before;
  }
}

// ln(max(filters * power, floor)) of all frames into out. N is the DFT length, Pad the samples that the first
// frame reaches before the wave, Kaldi the frame treatment of fbank.
template <int N, int Pad, bool Kaldi>
void mel_frames(const MelParams& p) {
  constexpr int M = N / 2;
  int32_t* range = scratch<int32_t>(3, 2 * p.mels);
  filter_ranges(p.filters, p.mels, M + 1, range);
  double* twiddle = scratch<double>(7, 2 * N);
  for (int k = 0; k < N; ++k) {
    twiddle[2 * k] = std::cos(k * (6.283185307179586 / N));
    twiddle[2 * k + 1] = -std::sin(k * (6.283185307179586 / N));
  }
  parallel_for((p.frames + VF - 1) / VF, 2, [&](int64_t begin, int64_t end) {
    double* a = scratch<double>(0, N * VD);
    double* b = scratch<double>(1, N * VD);
    float* edge = scratch<float>(2, kFrame * VF);
    float* samples = scratch<float>(4, kFrame * VF);
    float* power = scratch<float>(5, (M + 1) * VF);
    float* bands = scratch<float>(6, p.mels * VF);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * VF;
      const int count = p.frames - first < VF ? int(p.frames - first) : VF;
      const float* row[VF];
      for (int lane = 0; lane < VF; ++lane) {
        const int64_t from = (first + (lane < count ? lane : 0)) * kHop - Pad;
        row[lane] = p.wave + from;
        if (from >= 0 && from + kFrame <= p.samples) continue;
        row[lane] = edge + lane * kFrame;
        for (int64_t i = 0; i < kFrame; ++i) {
          int64_t at = from + i < 0 ? -(from + i) : from + i;
          if (at >= p.samples) at = 2 * (p.samples - 1) - at;
          edge[lane * kFrame + i] = p.wave[at];
        }
      }
      rows_to_tile<VF>(row, kFrame, samples);
      for (int lane = 0; lane < VF; lane += VD) {
        for (int i = 0; i < kFrame; ++i) {
          const vd x = dload(samples + i * VF + lane);
          dstore(a + i * VD, Kaldi ? x * dset(32768.0) : x * dset(p.window[i]));
        }
        if (Kaldi) {
          emphasise(a);
          for (int i = 0; i < kFrame; ++i) dstore(a + i * VD, dload(a + i * VD) * dset(p.window[i]));
        }
        for (int i = kFrame; i < N; ++i) dstore(a + i * VD, dset(0.0));
        fft<M>(a, b, twiddle);
        real_power<M>(a, twiddle, power + lane);
      }
      for (int64_t m = 0; m < p.mels; ++m) {
        const float* filter = p.filters + m * (M + 1);
        vf energy = vzero();
        for (int k = range[2 * m]; k < range[2 * m + 1]; ++k)
          energy = vfma(vset(filter[k]), vload(power + k * VF), energy);
        vstore(bands + m * VF, vmax(energy, vset(p.floor)));
      }
      log_array(bands, p.mels * VF);
      tile_to_rows<VF>(bands, p.mels, count, p.out + first * p.mels, p.mels);
    }
  });
}

}  // namespace

void log_mel(const MelParams& p) {
  mel_frames<400, 200, false>(p);
  const int64_t n = p.frames * p.mels, part = 16384;
  const int64_t parts = (n + part - 1) / part;
  float* maxima = scratch<float>(3, parts);
  parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      float m = p.out[c * part];
      for (int64_t i = c * part; i < n && i < (c + 1) * part; ++i) m = p.out[i] > m ? p.out[i] : m;
      maxima[c] = m;
    }
  });
  float top = maxima[0];
  for (int64_t c = 1; c < parts; ++c) top = maxima[c] > top ? maxima[c] : top;
  constexpr float kLog10e = 0.43429448190325182765f;
  const float least = top * kLog10e - 8.0f;
  parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * part; i < n && i < end * part; ++i) {
      const float m = p.out[i] * kLog10e;
      p.out[i] = ((m > least ? m : least) + 4.0f) * 0.25f;
    }
  });
}

void fbank(const MelParams& p) {
  mel_frames<512, 0, true>(p);
}

void resample(const ResampleParams& p) {
  const int64_t rounds = (p.outputs + p.phases - 1) / p.phases;
  parallel_for(rounds, grain_of(p.phases * p.taps / 4), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const int64_t left = p.outputs - j * p.phases, phases = left < p.phases ? left : p.phases;
      for (int64_t phase = 0; phase < phases; ++phase) {
        const float* x = p.x + j * p.step + p.first[phase];
        const float* weight = p.weight + phase * p.taps;
        vf sum = vzero();
        for (int64_t k = 0; k < p.taps; k += VF) sum = vfma(vload(x + k), vload(weight + k), sum);
        p.y[j * p.phases + phase] = vsum(sum);
      }
    }
  });
}

void lfr_cmvn(const LfrCmvnParams& p) {
  const int64_t left = (p.stack - 1) / 2, width = p.stack * p.dim;
  parallel_for(p.rows, grain_of(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t i = 0; i < p.stack; ++i) {
        int64_t frame = row * p.stride + i - left;
        frame = frame < 0 ? 0 : frame >= p.frames ? p.frames - 1 : frame;
        const float* in = p.in + frame * p.dim;
        const float *shift = p.shift + i * p.dim, *scale = p.scale + i * p.dim;
        float* out = p.out + row * width + i * p.dim;
        for (int64_t d = 0; d < p.dim; ++d) out[d] = (in[d] + shift[d]) * scale[d];
      }
  });
}

}  // namespace MING_ISA
}  // namespace ming
