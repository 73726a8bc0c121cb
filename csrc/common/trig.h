// Sine and cosine of float vectors. Included by *_cpu.cpp files only.
#pragma once

#include "common/simd.h"

namespace ming {
namespace MING_ISA {

// a - m pi for the multiple m of 1/2 that leaves at most pi/2; the three parts of pi have 8, 13 and 24 bits.
// The bounds are for arguments so large that m has lost digits; NaN passes through.
static inline vf vminus_pi(vf a, vf m) {
  vf r = vfnma(m, vset(3.140625f), a);
  r = vfnma(m, vset(9.676218032836914e-4f), r);
  r = vfnma(m, vset(3.178651e-8f), r);
  return vmax(vset(-1.5707964f), vmin(vset(1.5707964f), r));
}

// sin r for |r| <= pi/2, within 2e-7.
static inline vf vsin_near(vf r) {
  const vf t = r * r;
  vf p = vset(2.60864613e-6f);
  p = vfma(p, t, vset(-1.98109934e-4f));
  p = vfma(p, t, vset(8.33308697e-3f));
  p = vfma(p, t, vset(-1.66666597e-1f));
  return vfma(p * t, r, r);
}

// x with its sign changed where the integral n is odd
static inline vf valternate(vf x, vf n) {
  const vf odd = n - vset(2.0f) * vround(n * vset(0.5f));  // 0 or +-1
  return vfnma(vset(2.0f) * odd * odd, x, x);
}

// Within 3e-7 for |x| < 2^10, from there on within an ulp of x.
static inline vf vsin(vf x) {
  const vf n = vround(x * vset(0.318309886f));
  return valternate(vsin_near(vminus_pi(x, n)), n);
}
static inline vf vcos(vf x) {
  const vf n = vround(vfma(x, vset(0.318309886f), vset(-0.5f)));
  return vzero() - valternate(vsin_near(vminus_pi(x, n + vset(0.5f))), n);
}
static inline vf vsin_squared(vf x) {
  const vf s = vsin_near(vminus_pi(x, vround(x * vset(0.318309886f))));
  return s * s;
}

}  // namespace MING_ISA
}  // namespace ming
