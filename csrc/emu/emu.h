// The CUDA vocabulary for g++: kernels written against common/gpu.h run on the CPU, one block after the
// other, each thread of a block a fiber. Slow (tens of microseconds per block) and strict:
//
//   - a barrier or warp operation that not all living threads reach, or that they reach in different lines,
//     ends the launch with an error instead of a hang;
//   - shared memory is an allocation of its exact size per block, filled with NaN: AddressSanitizer sees an
//     overrun, a test sees a value nobody wrote;
//   - cp.async data arrive at the wait and not earlier;
//   - a vector whose address is no multiple of its size ends the launch with an error;
//   - MING_EMU_SEED=n takes warps and lanes in another order and lets a warp go on as far as it comes before
//     the next one runs, so that a missing barrier shows. Without it all threads advance together.
//
// Warp operations take all 32 lanes of a warp (those that have not returned). Launches take turns.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

struct uint2 {
  uint32_t x, y;
};
struct int2 {
  int32_t x, y;
};
struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  uint32_t x, y, z;
  constexpr dim3(uint32_t x_ = 1, uint32_t y_ = 1, uint32_t z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline uint2 make_uint2(uint32_t x, uint32_t y) {
  return {x, y};
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}

namespace ming::emu {

struct Index {
  uint32_t x, y, z;
};
// Of the fiber that runs now.
extern Index thread_index, block_index;
extern dim3 block_size, grid_size;

// Every alive thread of the block must come here from the same line.
void block_barrier(const char* file, int line);

// Every alive lane of the warp gives `bytes` (at most 32); returns the 32 values, valid until this lane's
// next warp operation. `lane_mask` must name all lanes.
const unsigned char* exchange(const void* value, size_t bytes, uint32_t lane_mask, const char* file,
                              int line);
uint32_t members();  // the lanes that took part in this lane's last exchange
int lane();
void expect_aligned(const void* at, size_t bytes);  // ends the launch unless `at` is a multiple of `bytes`

void* shared_block(const void* key, size_t bytes);  // one allocation per block and key
void* dynamic_shared();

void async_copy(void* to, const void* from, size_t bytes);  // `from` nullptr: zeros
void async_commit();
void async_wait(int groups_in_flight);

// A reference to a callable void().
struct Body {
  const void* object;
  void (*call)(const void* object);
};
// Runs the kernel; throws std::runtime_error naming it where it breaks a rule above.
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, Body body);

template <typename F>
void launch_kernel(const char* name, dim3 grid, dim3 block, size_t shared_bytes, const F& f) {
  launch(name, grid, block, shared_bytes,
         {&f, [](const void* object) { (*static_cast<const F*>(object))(); }});
}

template <typename T>
T shuffle(T value, int source, uint32_t mask, const char* file, int line) {
  T result;
  std::memcpy(&result, exchange(&value, sizeof(T), mask, file, line) + 32 * size_t(source), sizeof(T));
  return result;
}

}  // namespace ming::emu

#define threadIdx (::ming::emu::thread_index)
#define blockIdx (::ming::emu::block_index)
#define blockDim (::ming::emu::block_size)
#define gridDim (::ming::emu::grid_size)

#define MING_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(MING_HERE) {
  ::ming::emu::block_barrier(file, line);
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, MING_HERE) {
  ::ming::emu::exchange(&mask, sizeof(mask), mask, file, line);
}
// A source lane outside the warp (or group of `width` lanes) gives the lane's own value, as on the device.
template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, MING_HERE) {
  const int lane = ::ming::emu::lane();
  return ::ming::emu::shuffle(value, (lane & ~(width - 1)) | (source & (width - 1)), mask, file, line);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, MING_HERE) {
  const int lane = ::ming::emu::lane(), source = lane ^ bits;
  return ::ming::emu::shuffle(value, (source & ~(width - 1)) > (lane & ~(width - 1)) ? lane : source, mask,
                              file, line);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int delta, int width = 32, MING_HERE) {
  const int lane = ::ming::emu::lane(), first = lane & ~(width - 1);
  return ::ming::emu::shuffle(value, lane - delta < first ? lane : lane - delta, mask, file, line);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, MING_HERE) {
  const uint32_t vote = predicate != 0;
  const unsigned char* votes = ::ming::emu::exchange(&vote, sizeof(vote), mask, file, line);
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i)
    if (::ming::emu::members() >> i & 1) result |= uint32_t(votes[32 * i] & 1) << i;
  return result;
}
inline int __popc(uint32_t x) {
  return __builtin_popcount(x);
}
inline int __ffs(uint32_t x) {
  return __builtin_ffs(int(x));
}
inline int __clz(uint32_t x) {
  return x ? __builtin_clz(x) : 32;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
// Fibers switch only at barriers and warp operations: a plain read and write is atomic.
template <typename T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at = old + value;
  return old;
}
template <typename T>
T atomicCAS(T* at, T expected, T value) {
  const T old = *at;
  if (old == expected) *at = value;
  return old;
}
template <typename T>
T atomicOr(T* at, T value) {
  const T old = *at;
  *at = old | value;
  return old;
}

#define MING_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                 \
  do {                                                                                              \
    (void)(stream);                                                                                 \
    ::ming::emu::launch_kernel(#kernel, grid, block, shared_bytes, [&] { (kernel)(__VA_ARGS__); }); \
  } while (0)

#define MING_SHARED(type, name, dims) \
  static const char name##_key = 0;   \
  using name##_type = type dims;      \
  name##_type& name = *static_cast<name##_type*>(::ming::emu::shared_block(&name##_key, sizeof(name##_type)))

#define MING_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::ming::emu::dynamic_shared())

namespace ming::gpu {

using emu::expect_aligned;

inline void cp_async16(void* to, const void* from, bool valid) {
  expect_aligned(to, 16);
  if (valid) expect_aligned(from, 16);
  emu::async_copy(to, valid ? from : nullptr, 16);
}
inline void cp_async_commit() {
  emu::async_commit();
}
template <int Groups>
void cp_async_wait() {
  emu::async_wait(Groups);
}

// Four 8x8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8.
inline void ldmatrix_rows(uint32_t* r, int count, const void* row, bool transposed, const char* file,
                          int line) {
  expect_aligned(row, 16);
  const unsigned char* rows = emu::exchange(&row, sizeof(row), 0xffffffffu, file, line);
  const int lane = emu::lane();
  for (int m = 0; m < count; ++m) {
    uint16_t half[2];
    for (int i = 0; i < 2; ++i) {
      const int a = lane / 4, b = lane % 4 * 2 + i;
      const uint16_t* source;
      std::memcpy(&source, rows + 32 * (8 * m + (transposed ? b : a)), sizeof(source));
      half[i] = source[transposed ? a : b];
    }
    r[m] = half[0] | uint32_t(half[1]) << 16;
  }
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, MING_HERE) {
  ldmatrix_rows(r, 4, row, false, file, line);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, MING_HERE) {
  ldmatrix_rows(r, 4, row, true, file, line);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, MING_HERE) {
  ldmatrix_rows(r, 2, row, true, file, line);
}

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], MING_HERE) {
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const unsigned char* all = emu::exchange(mine, sizeof(mine), 0xffffffffu, file, line);
  const int lane = emu::lane(), column = lane % 4 * 2;
  const auto half = [&](int from, int reg, int which) {
    uint32_t word;
    std::memcpy(&word, all + 32 * from + 4 * reg, 4);
    return __uint_as_float(which ? word & 0xffff0000u : word << 16);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i / 2) * 8, n = column + i % 2;
    float sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2, reg = k / 8;
      sum += half(row % 8 * 4 + pair, row / 8 + 2 * reg, k % 2) * half(n * 4 + pair, 4 + reg, k % 2);
    }
    c[i] = sum;
  }
}

}  // namespace ming::gpu
