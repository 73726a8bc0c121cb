// One thread per Step channels of a frame of y.
#include "common/gpu.h"
#include "ops/conv/conv.h"

namespace ming::cuda {
namespace {

using namespace ming::gpu;

constexpr int kThreads = 256;

__device__ __forceinline__ float activate(const ConvFramesParams& p, float v, int64_t channel) {
  switch (p.act) {
    case FrameAct::leaky:
      return v < 0.0f ? p.slope * v : v;
    case FrameAct::snake: {
      const float alpha = p.alpha[channel], s = sinf(alpha * v);
      return fmaf(s * s, 1.0f / (alpha + 1e-9f), v);
    }
    default:
      return v;
  }
}

template <int Step>
__global__ void __launch_bounds__(kThreads) conv_frames_kernel(const ConvFramesParams p) {
  const int64_t pieces = p.channels / Step, index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= p.dilation * p.rows * pieces) return;
  const int64_t row = index / pieces, channel = index % pieces * Step;
  const int64_t t = row % p.rows * p.dilation + row / p.rows - p.before;
  Vec<float, Step> v = {};
  if (t >= 0 && t < p.frames) {
    const int64_t from = t % p.split * p.x_phase_stride + t / p.split * p.x_frame_stride + channel;
    v = load<Step>(p.x[0] + from);
#pragma unroll
    for (int k = 1; k < kMaxFrameInputs; ++k) {
      if (k >= p.inputs) break;
      const Vec<float, Step> other = load<Step>(p.x[k] + from);
#pragma unroll
      for (int i = 0; i < Step; ++i) v.at[i] += other.at[i];
    }
#pragma unroll
    for (int i = 0; i < Step; ++i) v.at[i] = activate(p, v.at[i] * p.scale, channel + i);
  }
  store(p.y + row * p.channels + channel, v);
}

bool wide(const ConvFramesParams& p) {
  bool all = p.channels % 4 == 0 && p.x_phase_stride % 4 == 0 && wide_rows<float>(p.y, 0);
  for (int64_t k = 0; k < p.inputs; ++k) all = all && wide_rows<float>(p.x[k], p.x_frame_stride);
  return all;
}

}  // namespace

void conv_frames(const ConvFramesParams& p, Stream stream) {
  const auto launch = [&](auto kernel, int step) {
    const int64_t threads = p.dilation * p.rows * (p.channels / step);
    MING_LAUNCH(kernel, dim3(uint32_t(ceil_div(threads, kThreads))), kThreads, 0, stream, p);
  };
  if (wide(p))
    launch(conv_frames_kernel<4>, 4);
  else
    launch(conv_frames_kernel<1>, 1);
}

}  // namespace ming::cuda
