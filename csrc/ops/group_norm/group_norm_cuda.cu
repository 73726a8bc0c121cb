// GroupNorm: a block per item and group, which reads its values three times, mostly from the cache. Per
// frame: a warp per frame and group. Both also write the zeros around the frames.
#include "common/gpu.h"
#include "ops/group_norm/group_norm.h"

namespace ming::cuda {
namespace {

using namespace ming::gpu;

constexpr int kThreads = 512;
constexpr int kFrameWarps = 8;

__device__ __forceinline__ float mish(float x) {
  const float e = expf(x < 20.0f ? x : 20.0f), n = e * (e + 2.0f);  // NaN comes back through the factor x
  return x * (n / (n + 2.0f));
}

// Mean and scale of a group, and what becomes of its values.
template <typename T>
struct Group {
  const GroupNormParams& p;
  int64_t item;
  float mean, scale;

  __device__ __forceinline__ void put(int64_t out_frame, int64_t channel) const {
    const int64_t frame = out_frame - p.before;
    T& y = static_cast<T*>(p.y)[item * p.y_item_stride + out_frame * p.y_frame_stride + channel];
    if (frame < 0 || frame >= p.frames) {
      y = from_float<T>(0.0f);
      return;
    }
    const float x =
        to_float(static_cast<const T*>(p.x)[item * p.x_item_stride + frame * p.x_frame_stride + channel]);
    float v = fmaf((x - mean) * scale, to_float(static_cast<const T*>(p.weight)[channel]),
                   to_float(static_cast<const T*>(p.bias)[channel]));
    if (p.mish) v = mish(v);
    if (p.shift) v += to_float(static_cast<const T*>(p.shift)[item * p.shift_stride + channel]);
    y = from_float<T>(v);
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) group_norm_kernel(const GroupNormParams p) {
  MING_SHARED(float, partial, [2][kThreads / 32]);
  const int32_t count = int32_t(p.channels / p.groups);
  const int64_t item = blockIdx.y, first = int64_t(blockIdx.x) * count;
  const T* x = static_cast<const T*>(p.x) + item * p.x_item_stride + first;
  // Neighbouring threads take neighbouring channels of a frame.
  const auto over = [&](int64_t frames, auto&& fn) {
    for (int64_t i = threadIdx.x; i < frames * count; i += kThreads) fn(i / count, i % count);
  };
  const auto value = [&](int64_t frame, int64_t channel) {
    return to_float(x[frame * p.x_frame_stride + channel]);
  };
  const float size = float(p.frames) * float(count);
  float sum = 0, squares = 0;
  over(p.frames, [&](int64_t frame, int64_t channel) { sum += value(frame, channel); });
  const float mean = block_sum<kThreads>(sum, partial[0]) / size;
  over(p.frames, [&](int64_t frame, int64_t channel) {
    const float d = value(frame, channel) - mean;
    squares = fmaf(d, d, squares);
  });
  const float scale = 1.0f / sqrtf(block_sum<kThreads>(squares, partial[1]) / size + p.eps);
  const Group<T> group{p, item, mean, scale};
  over(p.out_frames, [&](int64_t frame, int64_t channel) { group.put(frame, first + channel); });
}

template <typename T>
__global__ void __launch_bounds__(kFrameWarps * 32) frame_norm_kernel(const GroupNormParams p) {
  const int64_t index = int64_t(blockIdx.x) * kFrameWarps + threadIdx.x / 32;
  if (index >= p.batch * p.out_frames * p.groups) return;  // a whole warp
  const int lane = int(threadIdx.x) % 32, count = int(p.channels / p.groups);
  const int64_t row = index / p.groups, item = row / p.out_frames, out_frame = row % p.out_frames;
  const int64_t first = index % p.groups * count, frame = out_frame - p.before;
  Group<T> group{p, item, 0.0f, 0.0f};
  if (frame >= 0 && frame < p.frames) {
    const T* x = static_cast<const T*>(p.x) + item * p.x_item_stride + frame * p.x_frame_stride + first;
    float sum = 0, squares = 0;
    for (int i = lane; i < count; i += 32) sum += to_float(x[i]);
    group.mean = warp_sum(sum) / float(count);
    for (int i = lane; i < count; i += 32) {
      const float d = to_float(x[i]) - group.mean;
      squares = fmaf(d, d, squares);
    }
    group.scale = 1.0f / sqrtf(warp_sum(squares) / float(count) + p.eps);
  }
  for (int i = lane; i < count; i += 32) group.put(out_frame, first + i);
}

}  // namespace

void group_norm(const GroupNormParams& p, Stream stream) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (p.per_frame) {
      const int64_t rows = p.batch * p.out_frames * p.groups;
      MING_LAUNCH((frame_norm_kernel<T>), dim3(uint32_t(ceil_div(rows, kFrameWarps))), kFrameWarps * 32, 0,
                  stream, p);
    } else {
      MING_LAUNCH((group_norm_kernel<T>), dim3(uint32_t(p.groups), uint32_t(p.batch)), kThreads, 0, stream,
                  p);
    }
  });
}

}  // namespace ming::cuda
