// Audio front-ends: polyphase resampling, the two mel spectrograms and frame stacking.
//
//   resample:  y[j * phases + p] = sum_k weight[p][k] * x[j * step + first[p] + k]
//   log_mel:   frame t = samples t*160-200 .. t*160+199 of the wave, reflected at its ends; times window;
//              power = |DFT_400|^2 (201 bins); m = log10(max(filters * power, floor));
//              out = (max(m, max over the whole wave - 8) + 4) / 4
//   fbank:     frame t = 32768 * samples t*160 .. t*160+399; minus its mean; y_i = x_i - 0.97 x_{i-1}, where
//              x_{-1} = x_0; times window; zero-padded to 512; power (257 bins);
//              out = ln(max(filters * power, floor))
//   lfr_cmvn:  t = clamp(stride * q + i - (stack - 1) / 2, 0, T - 1)
//              out[q][i * D + d] = (in[t][d] + shift[i * D + d]) * scale[i * D + d]
//
// Tensors are float32; the DFT runs in float64.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"

namespace ming {

struct ResampleParams {
  const float* x;        // the wave with zeros before and after it, so that every window lies inside
  float* y;              // [outputs]
  const int32_t* first;  // [phases] index of the window of output p
  const float* weight;   // [phases, taps], taps a multiple of 16
  int64_t outputs, phases, taps, step;
};

struct MelParams {
  const float* wave;     // [samples]
  float* out;            // [frames, mels]
  const float* window;   // [400]
  const float* filters;  // [mels, 201 or 257]
  int64_t samples, frames, mels;
  float floor;  // smallest filter output, a positive normal number
};

struct LfrCmvnParams {
  const float* in;     // [frames, dim]
  const float* shift;  // [stack * dim]
  const float* scale;  // [stack * dim]
  float* out;          // [rows, stack * dim]
  int64_t frames, dim, rows, stack, stride;
};

MING_CPU_OP(resample, ResampleParams)
MING_CPU_OP(log_mel, MelParams)
MING_CPU_OP(fbank, MelParams)
MING_CPU_OP(lfr_cmvn, LfrCmvnParams)

}  // namespace ming
