// A thread per harmonic sums the turns of the frames, then a thread per sample mixes the harmonics.
#include "common/gpu.h"
#include "ops/sine_source/sine_source.h"

namespace ming::cuda {
namespace {

using namespace ming::gpu;

constexpr int kThreads = 256, kHarmonicThreads = 96;
static_assert(kMaxHarmonics <= kHarmonicThreads);

__device__ __forceinline__ double fraction(double x) {
  return x - double(int64_t(x));
}

__global__ void __launch_bounds__(kHarmonicThreads) turns_kernel(const SineSourceParams p) {
  const int64_t h = threadIdx.x;
  if (h >= p.harmonics) return;
  double turns = 0.0;
  for (int64_t t = 0; t < p.frames; ++t) {
    turns = fraction(turns + double(p.hop) * turn_step(p, p.f0[t], h));
    p.workspace[t * p.harmonics + h] = turns;
  }
}

__global__ void __launch_bounds__(kThreads) source_kernel(const SineSourceParams p) {
  const int64_t total = p.frames * p.hop, n = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= total) return;
  const int64_t frame = n / p.hop, i = n % p.hop;
  const float f0 = p.f0[frame], next_f0 = frame + 1 < p.frames ? p.f0[frame + 1] : 0.0f;
  const bool voiced = f0 > p.threshold;
  const float noise_gain = voiced ? p.sigma : p.amplitude / 3.0f;
  float sum = p.bias[0];
  for (int64_t h = 0; h < p.harmonics; ++h) {
    float s = noise_gain * p.noise[h * total + n];
    if (voiced) {
      const double* end = p.workspace + frame * p.harmonics + h;
      const TurnLine line = turn_line(p, frame, i >= p.hop / 2, frame > 0 ? end[-p.harmonics] : 0.0, *end,
                                      turn_step(p, f0, h), turn_step(p, next_f0, h));
      const double turns = line.base + (double(i) + line.offset) * line.slope +
                           (p.phase ? double(p.phase[h]) * 0.15915494309189535 : 0.0);
      s = fmaf(p.amplitude, sinf(float(fraction(turns)) * 6.28318531f), s);
    }
    if (p.sines) p.sines[h * total + n] = s;
    sum = fmaf(p.weight[h], s, sum);
  }
  p.source[n] = tanhf(sum);
}

}  // namespace

void sine_source(const SineSourceParams& p, Stream stream) {
  if (p.frames == 0) return;
  MING_LAUNCH(turns_kernel, dim3(1), kHarmonicThreads, 0, stream, p);
  MING_LAUNCH(source_kernel, dim3(uint32_t(ceil_div(p.frames * p.hop, kThreads))), kThreads, 0, stream, p);
}

}  // namespace ming::cuda
