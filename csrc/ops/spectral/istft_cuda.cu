// A block of kSamples samples: the spectra of the frames that reach them go to shared memory, then a thread
// per sample sums up.
#include "common/gpu.h"
#include "ops/spectral/istft.h"

namespace ming::cuda {
namespace {

using namespace ming::gpu;

constexpr int kThreads = 256, kSamples = 256;

// Frames that reach `samples` neighbouring samples.
constexpr int64_t reaching(const IstftParams& p, int64_t samples) {
  return (samples + p.size - 2) / p.hop + 1;
}

__global__ void __launch_bounds__(kThreads) istft_kernel(const IstftParams p) {
  MING_DYNAMIC_SHARED(float, spectra);  // [reaching frames][2 bins]
  const int bins = p.size / 2 + 1;
  const int64_t samples = (p.frames - 1) * p.hop, first = int64_t(blockIdx.x) * kSamples;
  const int64_t end = first + kSamples < samples ? first + kSamples : samples;
  const int64_t first_q = first_frame(first + p.size / 2, p);
  const int count = int(last_frame(end - 1 + p.size / 2, p) - first_q + 1);
  for (int i = int(threadIdx.x); i < count * bins; i += kThreads) {
    const float* x = p.x + (first_q + i / bins) * 2 * bins + i % bins;
    float m = x[0], phase = x[bins];
    if (p.log_sine) {
      m = expf(m);
      phase = sinf(phase);
    }
    m = m > p.limit ? p.limit : m;  // keeps NaN
    float* to = spectra + i / bins * 2 * bins + i % bins;
    to[0] = m * cosf(phase);
    to[bins] = m * sinf(phase);
  }
  __syncthreads();
  const int64_t s = first + threadIdx.x;
  if (s >= samples) return;
  const int64_t at = s + p.size / 2;
  float sum = 0.0f, squares = 0.0f;
  for (int64_t q = first_frame(at, p); q <= last_frame(at, p); ++q) {
    const int j = int(at - q * p.hop);
    const float *basis = p.basis + j * 2 * bins, *spectrum = spectra + (q - first_q) * 2 * bins;
    float value = 0.0f;
    for (int c = 0; c < 2 * bins; ++c) value = fmaf(basis[c], spectrum[c], value);
    sum += value;
    squares += p.window[j] * p.window[j];
  }
  const float y = sum / squares;
  p.wave[s] = y > p.bound ? p.bound : y < -p.bound ? -p.bound : y;
}

}  // namespace

void istft(const IstftParams& p, Stream stream) {
  const int64_t samples = (p.frames - 1) * p.hop;
  const int64_t shared = reaching(p, kSamples) * (p.size + 2) * int64_t(sizeof(float));
  MING_LAUNCH(istft_kernel, dim3(uint32_t(ceil_div(samples, kSamples))), kThreads, int(shared), stream, p);
}

}  // namespace ming::cuda
