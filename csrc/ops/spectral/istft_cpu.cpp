#include "common/scratch.h"
#include "common/thread_pool.h"
#include "common/transpose.h"
#include "common/trig.h"
#include "ops/spectral/istft.h"

namespace ming {
namespace MING_ISA {
namespace {

// Windowed frames [begin, begin + count), count <= VF: lanes are frames.
void synthesise(const IstftParams& p, int64_t begin, int count, float* frames) {
  const int bins = p.size / 2 + 1, columns = 2 * bins;
  alignas(64) float tile[(kMaxIstftSize + 2) * VF], out[kMaxIstftSize * VF];
  const float* row[VF];
  for (int lane = 0; lane < VF; ++lane) row[lane] = p.x + (begin + (lane < count ? lane : 0)) * columns;
  rows_to_tile<VF>(row, columns, tile);
  for (int b = 0; b < bins; ++b) {
    vf m = vload(tile + b * VF), phase = vload(tile + (bins + b) * VF);
    if (p.log_sine) {
      m = vexp(m);
      phase = vsin(phase);
    }
    m = vmin(vset(p.limit), m);
    vstore(tile + b * VF, m * vcos(phase));
    vstore(tile + (bins + b) * VF, m * vsin(phase));
  }
  for (int j = 0; j < p.size; ++j) {
    const float* basis = p.basis + j * columns;
    vf sum = vzero();
    for (int c = 0; c < columns; ++c) sum = vfma(vset(basis[c]), vload(tile + c * VF), sum);
    vstore(out + j * VF, sum);
  }
  tile_to_rows<VF>(out, p.size, count, frames + begin * p.size, p.size);
}

}  // namespace

void istft(const IstftParams& p) {
  float* frames = scratch<float>(0, p.frames * p.size);
  const int64_t blocks = (p.frames + VF - 1) / VF;
  parallel_for(blocks, grain_of(VF * p.size * 4), [&](int64_t block, int64_t last) {
    for (; block < last; ++block) {
      const int64_t left = p.frames - block * VF;
      synthesise(p, block * VF, left < VF ? int(left) : VF, frames);
    }
  });
  const int64_t samples = (p.frames - 1) * p.hop;
  parallel_for(samples, grain_of(2 * (p.size / p.hop + 1)), [&](int64_t s, int64_t end) {
    for (; s < end; ++s) {
      const int64_t at = s + p.size / 2;
      float sum = 0.0f, squares = 0.0f;
      for (int64_t q = first_frame(at, p); q <= last_frame(at, p); ++q) {
        const int64_t j = at - q * p.hop;
        sum += frames[q * p.size + j];
        squares += p.window[j] * p.window[j];
      }
      const float y = sum / squares;
      p.wave[s] = y > p.bound ? p.bound : y < -p.bound ? -p.bound : y;  // keeps NaN
    }
  });
}

}  // namespace MING_ISA
}  // namespace ming
