#include "common/scratch.h"
#include "common/thread_pool.h"
#include "common/trig.h"
#include "ops/sine_source/sine_source.h"

namespace ming {
namespace MING_ISA {
namespace {

inline double fraction(double x) {
  return x - double(int64_t(x));
}

inline vf vtanh(vf x) {
  return vset(1.0f) - vset(2.0f) / (vexp(x + x) + vset(1.0f));
}

struct Lanes {
  vf number;  // 0, 1, 2, ...
  Lanes() {
    float at[VF];
    for (int i = 0; i < VF; ++i) at[i] = float(i);
    number = vload(at);
  }
};

// Samples [begin, end) of a frame, on one line per harmonic.
void samples(const SineSourceParams& p, int64_t frame, int64_t begin, int64_t end, const TurnLine* line) {
  const int64_t total = p.frames * p.hop;
  const Lanes lanes;
  const bool voiced = p.f0[frame] > p.threshold;
  const vf noise_gain = vset(voiced ? p.sigma : p.amplitude / 3.0f);
  for (int64_t i = begin; i < end; i += VF) {
    const int64_t at = frame * p.hop + i, n = end - i;
    vf sum = vset(p.bias[0]);
    for (int64_t h = 0; h < p.harmonics; ++h) {
      vf s = noise_gain * vload_n(p.noise + h * total + at, n);
      if (voiced) {
        const double first = line[h].base + (double(i) + line[h].offset) * line[h].slope;
        vf turns = vfma(lanes.number, vset(float(line[h].slope)), vset(float(fraction(first))));
        turns = turns - vround(turns);
        s = vfma(vset(p.amplitude), vsin(turns * vset(6.28318531f)), s);
      }
      if (p.sines) vstore_n(p.sines + h * total + at, s, n);
      sum = vfma(vset(p.weight[h]), s, sum);
    }
    vstore_n(p.source + at, vtanh(sum), n);
  }
}

}  // namespace

void sine_source(const SineSourceParams& p) {
  const int64_t count = p.harmonics;
  // Turns at the ends of the frames, from the end of the one before the first on.
  double* ends = scratch<double>(0, (p.frames + 1) * count);
  for (int64_t h = 0; h < count; ++h) {
    ends[h] = 0.0;
    for (int64_t t = 0; t < p.frames; ++t)
      ends[(t + 1) * count + h] = fraction(ends[t * count + h] + double(p.hop) * turn_step(p, p.f0[t], h));
  }
  parallel_for(p.frames, grain_of(p.hop * count * 4), [&](int64_t frame, int64_t last) {
    for (; frame < last; ++frame)
      for (int second = 0; second < 2; ++second) {
        TurnLine line[kMaxHarmonics];
        for (int64_t h = 0; h < count; ++h) {
          const double next = frame + 1 < p.frames ? turn_step(p, p.f0[frame + 1], h) : 0.0;
          line[h] = turn_line(p, frame, second, ends[frame * count + h], ends[(frame + 1) * count + h],
                              turn_step(p, p.f0[frame], h), next);
          if (p.phase) line[h].base += double(p.phase[h]) * 0.15915494309189535;
        }
        samples(p, frame, second ? p.hop / 2 : 0, second ? p.hop : p.hop / 2, line);
      }
  });
}

}  // namespace MING_ISA
}  // namespace ming
