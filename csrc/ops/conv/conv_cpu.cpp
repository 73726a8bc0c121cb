#include "common/scratch.h"
#include "common/thread_pool.h"
#include "common/trig.h"
#include "ops/conv/conv.h"

namespace ming {
namespace MING_ISA {
namespace {

// One frame of y.
template <FrameAct kAct>
void frame(const ConvFramesParams& p, const float* const* x, const float* inverse, float* y) {
  const vf scale = vset(p.scale), slope = vset(p.slope);
  for (int64_t i = 0; i < p.channels; i += VF) {
    const int64_t n = p.channels - i;
    vf v = vload_n(x[0] + i, n);
    for (int64_t k = 1; k < p.inputs; ++k) v = v + vload_n(x[k] + i, n);
    v = v * scale;
    if (kAct == FrameAct::leaky) v = vfma(slope, vmin(vzero(), v), vmax(vzero(), v));
    if (kAct == FrameAct::snake)
      v = vfma(vsin_squared(v * vload_n(p.alpha + i, n)), vload_n(inverse + i, n), v);
    vstore_n(y + i, v, n);
  }
}

template <FrameAct kAct>
void conv_frames_of(const ConvFramesParams& p) {
  float* inverse = nullptr;
  if (kAct == FrameAct::snake) {
    inverse = scratch<float>(0, p.channels);
    for (int64_t c = 0; c < p.channels; ++c) inverse[c] = 1.0f / (p.alpha[c] + 1e-9f);
  }
  parallel_for(p.dilation * p.rows, grain_of(p.channels * (p.inputs + 3)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* y = p.y + row * p.channels;
      const int64_t t = row % p.rows * p.dilation + row / p.rows - p.before;
      if (t < 0 || t >= p.frames) {
        std::memset(y, 0, size_t(p.channels) * sizeof(float));
        continue;
      }
      const int64_t offset = t % p.split * p.x_phase_stride + t / p.split * p.x_frame_stride;
      const float* x[kMaxFrameInputs];
      for (int64_t k = 0; k < p.inputs; ++k) x[k] = p.x[k] + offset;
      frame<kAct>(p, x, inverse, y);
    }
  });
}

}  // namespace

void conv_frames(const ConvFramesParams& p) {
  switch (p.act) {
    case FrameAct::leaky:
      return conv_frames_of<FrameAct::leaky>(p);
    case FrameAct::snake:
      return conv_frames_of<FrameAct::snake>(p);
    default:
      return conv_frames_of<FrameAct::none>(p);
  }
}

}  // namespace MING_ISA
}  // namespace ming
