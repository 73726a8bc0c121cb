// Kernels with and without faults, to see what the emulation makes of them. Built by test_emulation.py.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

#include "common/gpu.h"

using namespace ming;
using namespace ming::gpu;

namespace {

constexpr int kThreads = 96;

// Each thread passes its number to its neighbour through shared memory.
__global__ void neighbour(int* out, bool barrier) {
  MING_SHARED(int, slot, [kThreads]);
  slot[threadIdx.x] = int(threadIdx.x);
  if (barrier) __syncthreads();
  out[threadIdx.x] = slot[(threadIdx.x + 1) % kThreads];
}

__global__ void barrier_in_a_branch() {
  if (threadIdx.x < 40) __syncthreads();
  __syncwarp();
}

__global__ void barriers_in_two_branches() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void shuffle_in_a_branch(int* out) {
  if (threadIdx.x % 2)
    out[threadIdx.x] = __shfl_sync(kAllLanes, 1, 0);
  else
    __syncthreads();
}

// Threads may leave early; those that stay still meet.
__global__ void early_exit(int* out) {
  if (threadIdx.x >= 70) return;
  __syncthreads();
  out[threadIdx.x] = __popc(__ballot_sync(kAllLanes, 1));
}

// A tile copied in the background, read after (or before) it has arrived.
__global__ void background_copy(const float* in, float* out, bool wait) {
  MING_SHARED(float, tile, [2][4 * kThreads]);
  for (int stage = 0; stage < 2; ++stage) {
    cp_async16(&tile[stage][4 * threadIdx.x], in + (stage * kThreads + threadIdx.x) * 4,
               stage == 0 || threadIdx.x < 50);
    cp_async_commit();
  }
  if (wait) cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 8; ++i) out[i * kThreads + threadIdx.x] = (&tile[0][0])[i * kThreads + threadIdx.x];
}

// Four floats at an address that only one float may have.
__global__ void misaligned(float* values, bool in_background) {
  MING_SHARED(float, tile, [4]);
  if (in_background)
    cp_async16(tile, values + 1, true);
  else
    store(values + 1, load<4>(values));
}

__global__ void overrun(int by) {
  MING_DYNAMIC_SHARED(float, memory);
  memory[threadIdx.x + by] = 1;
}

// One 16 x 16 by 16 x 8 product through shared memory.
__global__ void product(const bf16* a, const bf16* b, float* c) {
  MING_SHARED(bf16, left, [16][16]);
  MING_SHARED(bf16, right, [16][8]);  // [k][n]
  for (int i = threadIdx.x; i < 256; i += 32) left[i / 16][i % 16] = a[i];
  for (int i = threadIdx.x; i < 128; i += 32) right[i / 8][i % 8] = b[i];
  __syncthreads();
  uint32_t fa[4], fb[2];
  ldmatrix_x4(fa, &left[threadIdx.x % 16][threadIdx.x / 16 * 8]);
  ldmatrix_x2_trans(fb, &right[threadIdx.x % 16][0]);
  float sum[4] = {};
  mma_bf16(sum, fa, fb);
  for (int i = 0; i < 4; ++i) c[(threadIdx.x / 4 + i / 2 * 8) * 8 + threadIdx.x % 4 * 2 + i % 2] = sum[i];
}

void print(const std::vector<int>& values) {
  for (int v : values) std::printf("%d ", v);
}

int run(const std::string& name) {
  std::vector<int> out(kThreads, -7);
  if (name == "neighbour" || name == "no_barrier") {
    MING_LAUNCH(neighbour, dim3(1), kThreads, 0, nullptr, out.data(), name == "neighbour");
    print(out);
  } else if (name == "barrier_in_a_branch") {
    MING_LAUNCH(barrier_in_a_branch, dim3(1), kThreads, 0, nullptr);
  } else if (name == "barriers_in_two_branches") {
    MING_LAUNCH(barriers_in_two_branches, dim3(1), kThreads, 0, nullptr);
  } else if (name == "shuffle_in_a_branch") {
    MING_LAUNCH(shuffle_in_a_branch, dim3(1), kThreads, 0, nullptr, out.data());
  } else if (name == "early_exit") {
    MING_LAUNCH(early_exit, dim3(1), kThreads, 0, nullptr, out.data());
    print(out);
  } else if (name == "background_copy" || name == "no_wait") {
    std::vector<float> in(8 * kThreads), copied(8 * kThreads);
    for (int i = 0; i < 8 * kThreads; ++i) in[i] = float(i);
    MING_LAUNCH(background_copy, dim3(1), kThreads, 0, nullptr, in.data(), copied.data(), name != "no_wait");
    int right = 0;
    for (int i = 0; i < 8 * kThreads; ++i) {
      const int place = i % (4 * kThreads) / 4;
      right += copied[i] == (i < 4 * kThreads || place < 50 ? in[i] : 0.0f);
    }
    print({right});
  } else if (name == "misaligned" || name == "misaligned_copy") {
    alignas(16) float values[8] = {};
    MING_LAUNCH(misaligned, dim3(1), 32, 0, nullptr, values, name == "misaligned_copy");
  } else if (name == "overrun") {
    MING_LAUNCH(overrun, dim3(1), kThreads, kThreads * sizeof(float), nullptr, 1);
  } else if (name == "too_much_shared") {
    MING_LAUNCH(overrun, dim3(1), kThreads, 200 << 10, nullptr, 0);
  } else if (name == "product") {
    std::vector<bf16> a(256), b(128);
    std::vector<float> c(128);
    for (int i = 0; i < 256; ++i) a[i] = to_bf16(float(i * 7 % 23 - 11));
    for (int i = 0; i < 128; ++i) b[i] = to_bf16(float(i * 5 % 17 - 8));
    MING_LAUNCH(product, dim3(1), 32, 0, nullptr, a.data(), b.data(), c.data());
    int right = 0;
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 8; ++j) {
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += to_float(a[16 * i + k]) * to_float(b[8 * k + j]);
        right += sum == c[8 * i + j];
      }
    print({right});
  } else {
    return 2;
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    return run(count > 1 ? arguments[1] : "");
  } catch (const std::exception& problem) {
    std::fprintf(stderr, "%s\n", problem.what());
    return 1;
  }
}
