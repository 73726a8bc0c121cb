#include "ops/spectral/spectral.h"

#include "common/scratch.h"
#include "common/simd.h"
#include "common/thread_pool.h"
#include "common/transpose.h"

namespace ming {
namespace MING_ISA {
namespace {

constexpr int kFrame = 400, kHop = 160;

// VF frames are transformed at once, one per lane: the DFT below is plain scalar code over vectors. A complex
// value is two consecutive vectors (real, imaginary).
struct Complex {
  vf re, im;
};
inline Complex get(const float* buffer, int64_t i) {
  return {vload(buffer + 2 * i * VF), vload(buffer + (2 * i + 1) * VF)};
}
inline void put(float* buffer, int64_t i, Complex z) {
  vstore(buffer + 2 * i * VF, z.re);
  vstore(buffer + (2 * i + 1) * VF, z.im);
}
inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
inline Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
inline Complex minus_i(Complex a, Complex b) { return {a.re + b.im, a.im - b.re}; }  // a - i b
inline Complex plus_i(Complex a, Complex b) { return {a.re - b.im, a.im + b.re}; }   // a + i b
inline Complex scaled(Complex a, float k, Complex plus) {                            // k a + plus
  return {vfma(a.re, vset(k), plus.re), vfma(a.im, vset(k), plus.im)};
}
inline Complex scaled(Complex a, float k) { return {a.re * vset(k), a.im * vset(k)}; }
inline Complex times(Complex a, const float* w) {
  const vf c = vset(w[0]), s = vset(w[1]);
  return {vfnma(a.im, s, a.re * c), vfma(a.im, c, a.re * s)};
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
    constexpr float c1 = 0.30901699437494745f, c2 = -0.8090169943749475f;
    constexpr float s1 = 0.9510565162951535f, s2 = 0.5877852522924731f;
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
void fft_pass(const float* in, float* out, int n, int s, const float* twiddle) {
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
void fft(float* a, float* b, const float* twiddle) {
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

inline vf norm2(Complex z) { return vfma(z.re, z.re, z.im * z.im); }

// |DFT|^2 of 2M real points from the M-point transform z of (even, odd) pairs; power: [M + 1][VF].
template <int M>
void real_power(const float* z, const float* twiddle, float* power) {
  const Complex z0 = get(z, 0);
  const vf first = z0.re + z0.im, last = z0.re - z0.im;
  vstore(power, first * first);
  vstore(power + M * VF, last * last);
  for (int k = 1; k <= M / 2; ++k) {
    const Complex a = get(z, k), b = get(z, M - k), c = {b.re, vzero() - b.im};
    const Complex even = scaled(a + c, 0.5f), d = scaled(a - c, 0.5f), odd = {d.im, vzero() - d.re};
    const Complex turned = times(odd, twiddle + 2 * k);
    vstore(power + k * VF, norm2(even + turned));
    vstore(power + (M - k) * VF, norm2(even - turned));
  }
}

// Natural logarithm in place, within 2 ulp, of positive normal numbers; written for the auto-vectoriser.
void log_array(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    int32_t u;
    std::memcpy(&u, &x[i], 4);
    const int32_t e = (u - 0x3f3504f3) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
    const int32_t bits = u - (e << 23);
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

// The mean-free, pre-emphasised frame, in place; x: [400][VF]
void emphasise(float* x) {
  vf sum = vzero();
  for (int i = 0; i < kFrame; ++i) sum = sum + vload(x + i * VF);
  const vf mean = sum * vset(1.0f / kFrame);
  vf current = vload(x + (kFrame - 1) * VF) - mean;
  for (int i = kFrame - 1; i >= 0; --i) {
    const vf before = i > 0 ? vload(x + (i - 1) * VF) - mean : current;
    vstore(x + i * VF, vfnma(vset(0.97f), before, current));
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
  parallel_for((p.frames + VF - 1) / VF, 2, [&](int64_t begin, int64_t end) {
    float* a = scratch<float>(0, N * VF);
    float* b = scratch<float>(1, N * VF);
    float* edge = scratch<float>(2, kFrame * VF);
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
      rows_to_tile<VF>(row, kFrame, a);
      if (Kaldi) {
        for (int i = 0; i < kFrame; ++i) vstore(a + i * VF, vload(a + i * VF) * vset(32768.0f));
        emphasise(a);
      }
      for (int i = 0; i < kFrame; ++i) vstore(a + i * VF, vload(a + i * VF) * vset(p.window[i]));
      for (int i = kFrame; i < N; ++i) vstore(a + i * VF, vzero());
      fft<M>(a, b, p.twiddle);
      real_power<M>(a, p.twiddle, b);
      for (int64_t m0 = 0; m0 < p.mels; m0 += N) {
        const int64_t mels = p.mels - m0 < N ? p.mels - m0 : N;
        for (int64_t m = 0; m < mels; ++m) {
          const float* filter = p.filters + (m0 + m) * (M + 1);
          vf energy = vzero();
          for (int k = range[2 * (m0 + m)]; k < range[2 * (m0 + m) + 1]; ++k)
            energy = vfma(vset(filter[k]), vload(b + k * VF), energy);
          vstore(a + m * VF, vmax(energy, vset(p.floor)));
        }
        log_array(a, mels * VF);
        tile_to_rows<VF>(a, mels, count, p.out + first * p.mels + m0, p.mels);
      }
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

void fbank(const MelParams& p) { mel_frames<512, 0, true>(p); }

void resample(const ResampleParams& p) {
  const int64_t rounds = (p.outputs + p.phases - 1) / p.phases;
  parallel_for(rounds, 1 + 65536 / (p.phases * p.taps), [&](int64_t begin, int64_t end) {
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
  parallel_for(p.rows, 1 + 16384 / width, [&](int64_t begin, int64_t end) {
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
