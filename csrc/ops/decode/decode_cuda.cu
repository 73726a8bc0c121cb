// A thread per row.
#include "common/gpu.h"
#include "ops/decode/decode.h"

namespace ming::cuda {
namespace {

using namespace ming::gpu;

constexpr int kThreads = 64;

__global__ void __launch_bounds__(kThreads) advance_kernel(const AdvanceParams p, DeviceStatus* status) {
  const int64_t b = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= p.rows) return;
  for (int axis = 0; axis < 3; ++axis) ++p.positions[axis * p.positions_stride + b];
  const int32_t at = p.kv_lens[b]++;
  if (p.slots[b] >= 0) {
    const bool inside = at >= 0 && at / p.page_size < p.max_pages;
    if (!inside) report(status, Fault::kv_length, int64_t(at) + 1);
    const int64_t page = inside ? p.page_table[b * p.page_table_stride + at / p.page_size] : 0;
    p.slots[b] = inside ? page * p.page_size + at % p.page_size : -1;
  }
  const int64_t end = p.history_bounds[2 * b + 1];
  if (end >= 0 && end < p.history_length) {
    p.history[end] = p.ids[b];
    p.history_bounds[2 * b + 1] = end + 1;
  } else {
    report(status, Fault::history, end);
  }
}

}  // namespace

void advance(const AdvanceParams& p, Stream stream) {
  MING_LAUNCH(advance_kernel, dim3(ceil_div(p.rows, kThreads)), kThreads, 0, stream, p, device_status());
}

}  // namespace ming::cuda
