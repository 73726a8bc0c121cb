// Packing on the device: each thread writes one vector of a row. The lanes of a quantised group agree on its
// scale.
#include "common/gpu.h"
#include "ops/gemm/gemm.h"

namespace ming::cuda {
namespace {

using namespace ming::gpu;

constexpr int kThreads = 256;
constexpr int kQuantStep = 8;  // values of a thread
constexpr int kGroupLanes = kQuantGroup / kQuantStep;

// Values [k, k + Count) of a packed row before any rounding, zeros behind the end.
template <int Count, typename S>
__device__ __forceinline__ void read_source(const PackParams& p, int64_t row, int64_t k, bool wide,
                                            float (&values)[Count]) {
  const bool up = p.gated && row % 2;
  const int64_t line = p.gated ? row / 2 : row, stride = up ? p.source_stride[1] : p.source_stride[0];
  const S* from = static_cast<const S*>(up ? p.source[1] : p.source[0]) + line * stride + k;
  if (wide && k + Count <= p.k) {
    constexpr int kLoad = kWide<S> < Count ? kWide<S> : Count;
#pragma unroll
    for (int i = 0; i < Count; i += kLoad) {
      const Vec<S, kLoad> v = load<kLoad>(from + i);
#pragma unroll
      for (int j = 0; j < kLoad; ++j) values[i + j] = to_float(v.at[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Count; ++i) values[i] = k + i < p.k ? to_float(from[i]) : 0.0f;
  }
}

template <typename S, typename T>
__global__ void __launch_bounds__(kThreads) pack_kernel(const PackParams p, int64_t chunks, bool wide) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= row_count(p.n, p.gated) * chunks) return;
  float values[kWide<T>];
  read_source<kWide<T>, S>(p, index / chunks, index % chunks * kWide<T>, wide, values);
  Vec<T, kWide<T>> out;
#pragma unroll
  for (int i = 0; i < kWide<T>; ++i) out.at[i] = from_float<T>(values[i]);
  store(static_cast<T*>(p.packed) + index * kWide<T>, out);
}

template <typename S, WeightFormat F>
__global__ void __launch_bounds__(kThreads) quantise_kernel(const PackParams p, int64_t chunks, bool wide) {
  constexpr float kLevels = F == WeightFormat::int8 ? 127.0f : 7.0f;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool inside = index < row_count(p.n, p.gated) * chunks;  // true or false for a group as a whole
  float values[kQuantStep] = {};
  if (inside) read_source<kQuantStep, S>(p, index / chunks, index % chunks * kQuantStep, wide, values);
  // As bits, in the order of which a NaN is larger than all numbers: it must show, and spoils its group.
  uint32_t largest = 0;
  const auto take = [&](uint32_t other) { largest = other > largest ? other : largest; };
#pragma unroll
  for (int i = 0; i < kQuantStep; ++i) take(__float_as_uint(fabsf(values[i])));
#pragma unroll
  for (int bits = 1; bits < kGroupLanes; bits <<= 1) take(__shfl_xor_sync(kAllLanes, largest, bits));
  if (!inside) return;
  const bf16 stored = to_bf16(__uint_as_float(largest) / kLevels);
  const float scale = to_float(stored);
  if (threadIdx.x % kGroupLanes == 0) static_cast<bf16*>(p.scales)[index / kGroupLanes] = stored;
  uint32_t q[kQuantStep];
#pragma unroll
  for (int i = 0; i < kQuantStep; ++i) {
    const float level = fminf(fmaxf(rintf(values[i] / scale), -kLevels), kLevels);
    q[i] = uint32_t(scale == 0 ? 0 : int32_t(level));
  }
  if constexpr (F == WeightFormat::int8) {
    uint2 out = make_uint2(0, 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out.x |= (q[i] & 0xff) << (8 * i);
      out.y |= (q[4 + i] & 0xff) << (8 * i);
    }
    static_cast<uint2*>(p.packed)[index] = out;
  } else {
    uint32_t out = 0;
#pragma unroll
    for (int i = 0; i < kQuantStep; ++i) out |= (q[i] + 8) << (4 * i);
    static_cast<uint32_t*>(p.packed)[index] = out;
  }
}

template <typename S>
void pack_from(const PackParams& p, Stream stream) {
  const bool wide = wide_rows<S>(p.source[0], p.source_stride[0]) &&
                    (!p.gated || wide_rows<S>(p.source[1], p.source_stride[1]));
  const int64_t rows = row_count(p.n, p.gated), elements = row_elements(p.dtype, p.format, p.k);
  const auto launch = [&](auto kernel, int64_t step) {
    const int64_t chunks = elements / step;
    MING_LAUNCH(kernel, dim3(uint32_t(ceil_div(rows * chunks, kThreads))), kThreads, 0, stream, p, chunks,
                wide);
  };
  if (p.format == WeightFormat::int8)
    launch(quantise_kernel<S, WeightFormat::int8>, kQuantStep);
  else if (p.format == WeightFormat::int4)
    launch(quantise_kernel<S, WeightFormat::int4>, kQuantStep);
  else if (p.dtype == DType::f32)
    launch(pack_kernel<S, float>, kWide<float>);
  else
    launch(pack_kernel<S, bf16>, kWide<bf16>);
}

}  // namespace

void pack_weight(const PackParams& p, Stream stream) {
  switch (p.source_dtype) {
    case DType::f32:
      return pack_from<float>(p, stream);
    case DType::bf16:
      return pack_from<bf16>(p, stream);
    default:
      return pack_from<f16>(p, stream);
  }
}

}  // namespace ming::cuda
