// Decoding: a block takes a tile of ids. The first kernel sums the codes of each tile; the second finds every
// id's place from those sums and a scan of its own tile, and writes the tile's codes side by side.
#include "common/gpu.h"
#include "ops/audio_bpe/audio_bpe.h"

namespace ming::cuda {
namespace {

using namespace ming::gpu;

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = int(kAudioBpeTile), kPer = kTile / kThreads;

// Sum over the lanes up to this one.
__device__ __forceinline__ int warp_scan(int x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int left = __shfl_up_sync(kAllLanes, x, step);
    if (lane >= step) x += left;
  }
  return x;
}

// Sum over the threads up to this one; `sums` [kWarps] is shared memory nobody uses until the next barrier.
__device__ __forceinline__ int block_scan(int x, int* sums) {
  const int warp = threadIdx.x / 32;
  x = warp_scan(x);
  if (threadIdx.x % 32 == 31) sums[warp] = x;
  __syncthreads();
  for (int w = 0; w < warp; ++w) x += sums[w];
  return x;
}

struct Run {
  int32_t begin, length;
};

// What an id stands for, nothing where it or its table entry is wrong.
__device__ __forceinline__ Run run_of(const AudioBpeDecodeParams& p, int64_t id, DeviceStatus* status) {
  if (id < 0) report(status, Fault::bpe_id, id);
  if (id < 0 || id >= p.vocab) return {0, 0};
  const int64_t begin = p.table_offsets[id], end = p.table_offsets[id + 1];
  if (begin < 0 || end < begin || end > p.table_size || end - begin > p.longest) {
    report(status, Fault::bpe_table, id);
    return {0, 0};
  }
  return {int32_t(begin), int32_t(end - begin)};
}

__global__ void __launch_bounds__(kThreads) sum_kernel(const AudioBpeDecodeParams p, DeviceStatus* status) {
  MING_SHARED(int, sums, [kWarps]);
  const int64_t first = int64_t(blockIdx.x) * kTile;
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int64_t n = first + i * kThreads + threadIdx.x;
    if (n < p.tokens) sum += run_of(p, p.ids[n], status).length;
  }
  sum = block_scan(sum, sums);
  if (threadIdx.x == kThreads - 1) p.workspace[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    expand_kernel(const AudioBpeDecodeParams p, DeviceStatus* status) {
  MING_SHARED(int, sums, [2][kWarps]);
  MING_SHARED(int, before, [1]);          // codes of earlier tiles
  MING_SHARED(int, starts, [kTile + 1]);  // place of each id's codes among those of the tile
  MING_SHARED(int, begins, [kTile]);      // and in the table
  const int64_t first = int64_t(blockIdx.x) * kTile;
  const int count = int(p.tokens - first < kTile ? p.tokens - first : kTile);

  int earlier = 0;
  for (int64_t tile = threadIdx.x; tile < blockIdx.x; tile += kThreads) earlier += p.workspace[tile];
  earlier = block_scan(earlier, sums[0]);
  if (threadIdx.x == kThreads - 1) before[0] = earlier;

  const int own = int(threadIdx.x) * kPer;
  int lengths[kPer], sum = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    Run run{0, 0};
    if (own + i < count) run = run_of(p, p.ids[first + own + i], status);
    begins[own + i] = run.begin;
    lengths[i] = run.length;
    sum += run.length;
  }
  int place = block_scan(sum, sums[1]) - sum;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    starts[own + i] = place;
    place += lengths[i];
  }
  if (threadIdx.x == kThreads - 1) starts[kTile] = place;
  __syncthreads();

  const int base = before[0], total = starts[kTile];
  for (int code = threadIdx.x; code < total; code += kThreads) {
    int low = 0, high = kTile;  // the id in [low, high) that the code belongs to
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (starts[middle] <= code)
        low = middle;
      else
        high = middle;
    }
    p.codes[int64_t(base) + code] = p.table_codes[begins[low] + code - starts[low]];
  }

  // Rows that begin in this tile; the last tile also has those that begin behind it.
  const bool last = blockIdx.x == gridDim.x - 1;
  for (int64_t row = threadIdx.x; row <= p.rows; row += kThreads) {
    const int64_t given = p.cu_ids[row];
    const int64_t n = given < 0 ? 0 : given < p.tokens ? given : p.tokens;
    if (n < first || n > first + count || (n == first + count && !last)) continue;
    if (n != given || (row > 0 && p.cu_ids[row - 1] > given)) report(status, Fault::cu_seqlens, given);
    p.cu_codes[row] = base + starts[n - first];
  }
}

}  // namespace

void audio_bpe_decode(const AudioBpeDecodeParams& p, Stream stream) {
  const dim3 grid(uint32_t(audio_bpe_tiles(p.tokens)));
  MING_LAUNCH(sum_kernel, grid, kThreads, 0, stream, p, device_status());
  MING_LAUNCH(expand_kernel, grid, kThreads, 0, stream, p, device_status());
}

}  // namespace ming::cuda
