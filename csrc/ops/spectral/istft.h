// Inverse short-time Fourier transform from magnitudes and phases: the vocoder's last step.
//
//   m = exp(x[q][b]), p = sin(x[q][B + b])    log_sine; otherwise m, p = x[q][b], x[q][B + b]
//   m = min(m, limit), re = m cos p, im = m sin p
//   frame[q][j] = sum_b basis[j][b] * re_b + basis[j][B + b] * im_b
//   wave[s] = clamp(sum_q frame[q][s + N/2 - q * hop] / sum_q window[s + N/2 - q * hop]^2, -bound, bound)
//
// for 0 <= s < (F - 1) * hop, over the frames q that reach s, in ascending order. The basis holds the window
// and the inverse transform. All float32 and dense.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/op.h"

namespace ming {

constexpr int kMaxIstftSize = 64;

struct IstftParams {
  const float* x;       // [F, 2 B], B = N/2 + 1
  const float* basis;   // [N, 2 B]
  const float* window;  // [N]
  float* wave;          // [(F - 1) * hop]
  int64_t frames, hop;  // F >= 1; N/8 <= hop <= N/2
  int32_t size;         // N, even, 2..64
  float limit, bound;
  bool log_sine;
};

// The first and the last frame that reach a sample; `at` is the sample plus N/2.
MING_BOTH int64_t first_frame(int64_t at, const IstftParams& p) {
  return at < p.size ? 0 : (at - p.size) / p.hop + 1;
}
MING_BOTH int64_t last_frame(int64_t at, const IstftParams& p) {
  return at / p.hop < p.frames ? at / p.hop : p.frames - 1;
}

MING_OP(istft, IstftParams)

}  // namespace ming
