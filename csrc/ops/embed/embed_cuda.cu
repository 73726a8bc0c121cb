// A block copies a run of one row. Media rows are copied by a second kernel, over what the first one wrote.
#include "common/gpu.h"
#include "ops/embed/embed.h"

namespace ming::cuda {
namespace {

using namespace ming::gpu;

constexpr int kThreads = 256;

template <typename T, int Step>
__device__ __forceinline__ void copy_row(const T* from, T* to, int64_t hidden) {
  const int64_t i = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * Step;
  if (i < hidden) store_global(to + i, load<Step>(from + i));
}

template <typename T, int Step>
__global__ void __launch_bounds__(kThreads) embed_kernel(const EmbedParams p) {
  const int64_t n = blockIdx.x;
  int64_t id = p.ids[n];
  id = id < 0 ? 0 : id < p.vocab ? id : p.vocab - 1;
  copy_row<T, Step>(static_cast<const T*>(p.table) + id * p.table_stride, static_cast<T*>(p.y) + n * p.hidden,
                    p.hidden);
}

template <typename T, int Step>
__global__ void __launch_bounds__(kThreads) media_kernel(const EmbedParams p, DeviceStatus* status) {
  const int64_t row = p.media_rows[blockIdx.x];
  if (row < 0 || row >= p.tokens) {
    if (threadIdx.x == 0) report(status, Fault::media_row, row);
    return;
  }
  copy_row<T, Step>(static_cast<const T*>(p.media_feats) + blockIdx.x * p.feats_stride,
                    static_cast<T*>(p.y) + row * p.hidden, p.hidden);
}

template <typename T, int Step>
void run(const EmbedParams& p, Stream stream) {
  const uint32_t runs = uint32_t(ceil_div(p.hidden, kThreads * Step));
  MING_LAUNCH((embed_kernel<T, Step>), dim3(uint32_t(p.tokens), runs), kThreads, 0, stream, p);
  MING_LAUNCH((media_kernel<T, Step>), dim3(uint32_t(p.media), runs), kThreads, 0, stream, p,
              device_status());
}

}  // namespace

void embed(const EmbedParams& p, Stream stream) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const bool wide = p.hidden % kWide<T> == 0 && wide_rows<T>(p.table, p.table_stride) &&
                      wide_rows<T>(p.media_feats, p.feats_stride) && wide_rows<T>(p.y, 0);
    wide ? run<T, kWide<T>>(p, stream) : run<T, 1>(p, stream);
  });
}

}  // namespace ming::cuda
