// One block per patch row. Its values are written in order; the bytes of the 14 x 14 pixels behind them are
// read three times, the last two from the cache.
#include "common/gpu.h"
#include "ops/image/image.h"

namespace ming::cuda {
namespace {

using namespace ming::gpu;

constexpr int kThreads = 128;
constexpr int kPatch = 14, kPlane = kPatch * kPatch, kRow = 3 * 2 * kPlane;

// Without a run-time index, which would put the array into local memory.
__device__ __forceinline__ float pick(const float (&of)[3], int channel) {
  return channel == 0 ? of[0] : channel == 1 ? of[1] : of[2];
}

template <typename S>
__global__ void __launch_bounds__(kThreads) patchify_kernel(const PatchifyParams p) {
  const int row = int(blockIdx.x), patch = row % 4, cell = row / 4;
  const int columns = int(p.width) / (2 * kPatch), rows = int(p.height) / (2 * kPatch);
  const int y0 = (cell / columns % rows * 2 + patch / 2) * kPatch;
  const int x0 = (cell % columns * 2 + patch % 2) * kPatch;
  const int64_t frame = p.height * p.width * 3, line = p.width * 3;
  const S* src =
      static_cast<const S*>(p.src) + int64_t(cell / columns / rows) * 2 * frame + y0 * line + x0 * 3;
  float* to = p.dst + int64_t(row) * kRow;
  for (int i = threadIdx.x; i < kRow; i += kThreads) {
    const int c = i / (2 * kPlane), t = p.frames == 1 ? 0 : i / kPlane % 2;
    const int y = i % kPlane / kPatch, x = i % kPatch;
    const double pixel = double(src[t * frame + y * line + 3 * x + c]);
    to[i] = (float(pixel * (1.0 / 255.0)) - pick(p.mean, c)) / pick(p.std, c);
  }
}

}  // namespace

void patchify(const PatchifyParams& p, Stream stream) {
  const dim3 grid{uint32_t((p.frames + 1) / 2 * (p.height / kPatch) * (p.width / kPatch))};
  if (p.src_dtype == DType::u8)
    MING_LAUNCH((patchify_kernel<uint8_t>), grid, kThreads, 0, stream, p);
  else
    MING_LAUNCH((patchify_kernel<float>), grid, kThreads, 0, stream, p);
}

}  // namespace ming::cuda
