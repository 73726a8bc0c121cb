#include "common/simd.h"
#include "common/thread_pool.h"
#include "ops/group_norm/group_norm.h"

namespace ming {
namespace MING_ISA {
namespace {

constexpr int64_t kBlock = 64;  // frames summed at a time, so that long sums lose no digits

// x tanh(log(1 + e^x)) = x n / (n + 2) with n = e^x (e^x + 2); beyond 20 the quotient is 1.
inline vf vmish(vf x) {
  const vf e = vexp(vmin(vset(20.0f), x));
  const vf n = e * (e + vset(2.0f));
  return x * (n / (n + vset(2.0f)));
}

// One group of channels of some frames of one item.
template <typename T>
struct Group {
  const GroupNormParams& p;
  int64_t item, first, frames, channel, count;  // frames from `first`, channels from `channel`

  const T* row(int64_t frame) const {
    return static_cast<const T*>(p.x) + item * p.x_item_stride + (first + frame) * p.x_frame_stride + channel;
  }

  // The sum of the vectors at(values, elements left).
  template <typename F>
  float sum(F&& at) const {
    vf total = vzero();
    for (int64_t begin = 0; begin < frames; begin += kBlock) {
      const int64_t end = begin + kBlock < frames ? begin + kBlock : frames;
      vf part = vzero();
      for (int64_t t = begin; t < end; ++t)
        for (int64_t i = 0; i < count; i += VF) part = part + at(row(t) + i, count - i);
      total = total + part;
    }
    return vsum(total);
  }

  void normalise() const {
    const float size = float(frames) * float(count);
    const float mean = sum([](const T* x, int64_t n) { return vload_n(x, n); }) / size;
    const vf centre = vset(mean);
    const float squares = sum([&](const T* x, int64_t n) {
      // Missing tail lanes read as the mean, so that they add nothing.
      const vf d = vload_n(x, n, mean) - centre;
      return d * d;
    });
    const vf scale = vset(1.0f / std::sqrt(squares / size + p.eps));
    const T *weight = static_cast<const T*>(p.weight) + channel,
            *bias = static_cast<const T*>(p.bias) + channel;
    const T* shift = p.shift ? static_cast<const T*>(p.shift) + item * p.shift_stride + channel : nullptr;
    for (int64_t t = 0; t < frames; ++t) {
      const T* x = row(t);
      T* y =
          static_cast<T*>(p.y) + item * p.y_item_stride + (p.before + first + t) * p.y_frame_stride + channel;
      for (int64_t i = 0; i < count; i += VF) {
        const int64_t n = count - i;
        vf v = vfma((vload_n(x + i, n) - centre) * scale, vload_n(weight + i, n), vload_n(bias + i, n));
        if (p.mish) v = vmish(v);
        if (shift) v = v + vload_n(shift + i, n);
        vstore_n(y + i, v, n);
      }
    }
  }
};

template <typename T>
void clear_padding(const GroupNormParams& p) {
  for (int64_t item = 0; item < p.batch; ++item)
    for (int64_t t = 0; t < p.out_frames; ++t) {
      if (t == p.before) t += p.frames;
      if (t < p.out_frames)
        std::memset(static_cast<T*>(p.y) + item * p.y_item_stride + t * p.y_frame_stride, 0,
                    size_t(p.channels) * sizeof(T));
    }
}

template <typename T>
void group_norm_typed(const GroupNormParams& p) {
  clear_padding<T>(p);
  const int64_t count = p.channels / p.groups;
  // Pieces with a mean of their own: frames, or whole items.
  const int64_t frames = p.per_frame ? 1 : p.frames, pieces = p.per_frame ? p.frames : 1;
  if (p.frames == 0) return;
  parallel_for(p.batch * pieces * p.groups, grain_of(frames * count), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t piece = i / p.groups;
      Group<T>{p, piece / pieces, piece % pieces, frames, i % p.groups * count, count}.normalise();
    }
  });
}

}  // namespace

void group_norm(const GroupNormParams& p) {
  p.dtype == DType::f32 ? group_norm_typed<float>(p) : group_norm_typed<bf16>(p);
}

}  // namespace MING_ISA
}  // namespace ming
