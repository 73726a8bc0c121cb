// The vocoder's excitation: harmonics of a fundamental given per frame, with noise, mixed into one wave.
//
//   sine[h][n]  = voiced ? amplitude * sin(2 pi turns[h][n] + phase[h]) + sigma * noise[h][n]
//                        : amplitude / 3 * noise[h][n]                        voiced: f0[n / hop] > threshold
//   source[n]   = tanh(bias + sum_h weight[h] * sine[h][n])
//
// With r[h][t] = f0[t] * (h + 1) / rate, rounded to fp32 at each of the two steps, the phase in turns is
//   held:          sum of r[h][m / hop] over the samples m <= n
//   interpolated:  hop * (sum of r[h][s] over the frames s <= t), linearly between the middles of the frames
//                  and constant outside the first and last middle
// It is accumulated in float64 and reduced to one turn before anything is rounded to fp32: a phase of
// thousands of turns loses nothing.
//
// All float32 but where marked; outputs and noise dense. A sample depends on the frames before it alone
// (interpolated: and on the next one).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/op.h"

namespace ming {

constexpr int kMaxHarmonics = 65;

struct SineSourceParams {
  const float* f0;      // [T] Hz
  const float* noise;   // [H, T * hop]
  const float* phase;   // [H] radians, or nullptr for zeros
  const float* weight;  // [H]
  const float* bias;    // [1]
  float* source;        // [T * hop]
  float* sines;         // [H, T * hop], or nullptr
  double* workspace;    // [T, H] on a device: turns at the end of each frame; nullptr on the CPU
  int64_t frames, hop, harmonics;
  float rate, amplitude, sigma, threshold;
  bool interpolated;
};

// Turns of one harmonic as a line over the samples i of a frame: base + (i + offset) * slope.
struct TurnLine {
  double base, offset, slope;
};

// The line of a frame's samples before its middle (hop / 2, rounded down), or of the others (`second`).
// `before` and `end` are the turns of the whole frames before it and of those and itself, `step` and
// `next_step` are r of the frame and of the next one.
MING_BOTH TurnLine turn_line(const SineSourceParams& p, int64_t frame, bool second, double before, double end,
                             double step, double next_step) {
  if (!p.interpolated) return {before, 1.0, step};
  if (second) return {end, 0.5 - 0.5 * double(p.hop), frame + 1 < p.frames ? next_step : 0.0};
  return frame > 0 ? TurnLine{before, 0.5 + 0.5 * double(p.hop), step} : TurnLine{end, 0.0, 0.0};
}

// r of a harmonic (0 the fundamental).
MING_BOTH double turn_step(const SineSourceParams& p, float f0, int64_t harmonic) {
  return double(f0 * float(harmonic + 1) / p.rate);
}

MING_OP(sine_source, SineSourceParams)

}  // namespace ming
