// The experts with few rows each: blocks (16 weight rows, expert that has rows).
#include "ops/gemm/epilogue.cuh"
#include "ops/gemm/rows.h"
#include "ops/gemm/rows_stream.cuh"

namespace ming::cuda {
namespace {

using namespace ming::gpu;

struct Group {
  int expert, begin, end;  // expert -1: none
};

// The `rank`-th expert that has rows, for the whole block. Offsets out of order are reported and left out.
__device__ __forceinline__ Group active_expert(const GroupedGemmParams& p, int rank, DeviceStatus* status) {
  MING_SHARED(int, counts, [kStreamWarps]);
  MING_SHARED(Group, found, [1]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool reports = blockIdx.x == 0 && blockIdx.y == 0;
  if (threadIdx.x == 0) {
    found[0] = {-1, 0, 0};
    if (reports && p.offsets[0] != 0) report(status, Fault::offsets, p.offsets[0]);
    if (reports && p.offsets[p.experts] != p.slots) report(status, Fault::offsets, p.offsets[p.experts]);
  }
  for (int base = 0, seen = 0; base < p.experts && seen <= rank; base += kStreamThreads) {
    const int expert = base + int(threadIdx.x);
    int begin = 0, end = 0;
    if (expert < p.experts) {
      begin = p.offsets[expert];
      end = p.offsets[expert + 1];
      if (begin < 0 || end < begin || end > p.slots) {
        if (reports) report(status, Fault::offsets, end);
        begin = end = 0;
      }
    }
    const uint32_t active = __ballot_sync(kAllLanes, end > begin);
    if (lane == 0) counts[warp] = __popc(active);
    __syncthreads();
    int before = seen, total = 0;
    for (int i = 0; i < kStreamWarps; ++i) {
      before += i < warp ? counts[i] : 0;
      total += counts[i];
    }
    if (end > begin && before + __popc(active & ((1u << lane) - 1)) == rank) found[0] = {expert, begin, end};
    seen += total;
    __syncthreads();
  }
  return found[0];
}

template <typename T, WeightFormat F, int Rows, bool Wide>
__global__ void __launch_bounds__(kStreamThreads, 2)
    rows_grouped_kernel(const GroupedGemmParams p, bool gated, DeviceStatus* status) {
  const Group group = active_expert(p, int(blockIdx.y), status);
  if (group.expert < 0) return;
  T* y = static_cast<T*>(p.y);
  stream_tile<T, F, Rows, Wide>(
      weight_rows<T, F>(p, gated, group.expert), int64_t(blockIdx.x) * kTileRows, static_cast<const T*>(p.x),
      group.end - group.begin, p.k, gated,
      [&](int64_t i) {
        const int64_t place = group.begin + i, slot = p.rows[place];
        if (slot < 0 || slot >= p.slots) {
          if (blockIdx.x == 0) report(status, Fault::rows, slot);
          return Source{-1, 0};
        }
        return gated ? Source{slot / p.top_k * p.x_stride, place} : Source{place * p.x_stride, slot};
      },
      [&](int64_t row, int64_t column, float sum) { y[row * p.y_stride + column] = from_float<T>(sum); },
      [&](int64_t row, int64_t column, float gate, float up) {
        y[row * p.y_stride + column] = from_float<T>(silu(gate) * up);
      });
}

}  // namespace

void rows_grouped_gemm(const GroupedGemmParams& p, bool gated, Stream stream) {
  if (p.slots == 0) return;
  const int64_t most = p.slots < p.experts ? p.slots : p.experts;
  const dim3 grid(uint32_t(ceil_div(row_count(p.n, gated), kTileRows)), uint32_t(most));
  with_stream_kernel(p, ceil_div(p.slots, p.experts), [&](auto kernel) {
    using K = decltype(kernel);
    MING_LAUNCH((rows_grouped_kernel<typename K::Type, K::kFormat, K::kRows, K::kWideRows>), grid,
                kStreamThreads, 0, stream, p, gated, device_status());
  });
}

}  // namespace ming::cuda
