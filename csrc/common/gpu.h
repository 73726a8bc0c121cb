// What every .cu file is written with: CUDA under nvcc, fibers on the CPU under g++ (emu/emu.h).
//
// Kernels keep to the names here and in emu.h. Shared memory is declared with MING_SHARED(type, name, [dims])
// or MING_DYNAMIC_SHARED(type, name), launches are MING_LAUNCH(kernel, grid, block, shared bytes, stream,
// args...); inline assembly stays in this file. Warp operations take whole warps.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/device_status.h"
#include "common/dtype.h"
#include "common/op.h"

#if defined(MING_EMU)
#include "emu/emu.h"
#else
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define MING_SHARED(type, name, dims) __shared__ __align__(16) type name dims

#define MING_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char ming_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(ming_dynamic_shared)

// A grid without blocks launches nothing.
#define MING_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                     \
  do {                                                                                                  \
    const dim3 ming_grid = grid;                                                                        \
    if (ming_grid.x == 0 || ming_grid.y == 0 || ming_grid.z == 0) break;                                \
    if ((shared_bytes) > (48 << 10))                                                                    \
      ::ming::gpu::check(                                                                               \
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), \
          #kernel);                                                                                     \
    kernel<<<ming_grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);         \
    ::ming::gpu::check(cudaGetLastError(), #kernel);                                                    \
  } while (0)

namespace ming::gpu {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Only the emulation says so: a device faults by itself.
__device__ __forceinline__ void expect_aligned(const void*, size_t) {}

// Copies 16 bytes to shared memory without registers, or fills them with zeros; both addresses 16-byte
// aligned.
__device__ __forceinline__ void cp_async16(void* to, const void* from, bool valid) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `Groups` of this thread's committed groups are still under way.
template <int Groups>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

// Matrices of 8 rows of 16 bytes in shared memory; lane i gives the address of row i % 8 of matrix i / 8.
// Lane l gets row l / 4, values 2 * (l % 4) and the next, of each (of the transposed matrix with _trans).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8] in bfloat16 with fp32 sums. With g = lane / 4, t = lane % 4:
//   a[0], a[2]: row g, k = 2t, 2t+1 and 2t+8, 2t+9;  a[1], a[3]: row g + 8;  b[0], b[1]: the same k of column
//   g; c[0], c[1]: row g, columns 2t, 2t+1;  c[2], c[3]: row g + 8
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace ming::gpu
#endif

namespace ming::gpu {

constexpr uint32_t kAllLanes = 0xffffffffu;

// The float a value of type T holds after rounding.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

// Two values side by side, as mma_bf16 takes them.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#if defined(MING_EMU)
  return to_bf16(low).bits | uint32_t(to_bf16(high).bits) << 16;
#else
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}

// 2^x within 2^-22 of its value, exactly 1 at 0; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approx(float x) {
#if defined(MING_EMU)
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// The sums of two pairs of bfloat16, each rounded.
__device__ __forceinline__ uint32_t add_bf16x2(uint32_t a, uint32_t b) {
#if defined(MING_EMU)
  const auto high = [](uint32_t x) { return __uint_as_float(x & 0xffff0000u); };
  return pack_bf16(high(a << 16) + high(b << 16), high(a) + high(b));
#else
  uint32_t sum;  // a * 1 + b: plain addition needs compute capability 9.0
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
  return sum;
#endif
}

// (x & mask) | bits in one instruction; the compiler makes two of it where both are constants.
__device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
#if defined(MING_EMU)
  return (x & mask) | bits;
#else
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
  return y;
#endif
}

// `Count` values of T moved as one access; the address is a multiple of its size (at most 16 bytes).
template <typename T, int Count>
struct alignas(sizeof(T) * Count) Vec {
  T at[Count];
};
template <int Count, typename T>
__device__ __forceinline__ Vec<T, Count> load(const T* from) {
  expect_aligned(from, sizeof(Vec<T, Count>));
  return *reinterpret_cast<const Vec<T, Count>*>(from);
}
template <int Count, typename T>
__device__ __forceinline__ void store(T* to, const Vec<T, Count>& values) {
  expect_aligned(to, sizeof(values));
  *reinterpret_cast<Vec<T, Count>*>(to) = values;
}
// 16 or 8 bytes that are read once: they pass the first cache by, and may be read ahead of stores.
template <typename V>
__device__ __forceinline__ V load_once(const void* from) {
  static_assert(sizeof(V) == 8 || sizeof(V) == 16);
  V v;
  expect_aligned(from, sizeof(V));
#if defined(MING_EMU)
  std::memcpy(&v, from, sizeof(V));
#else
  // volatile: without, the compiler moves a load out of the branch that guards it
  if constexpr (sizeof(V) == 16)
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
  else
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
#endif
  return v;
}

// The same to global memory, as one access for certain: of store() the compiler sometimes makes several.
template <int Count, typename T>
__device__ __forceinline__ void store_global(T* to, const Vec<T, Count>& values) {
#if !defined(MING_EMU)
  if constexpr (sizeof(values) == 16) {
    uint4 v;
    std::memcpy(&v, &values, sizeof(v));
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
    return;
  }
#endif
  store(to, values);
}
// Values of T in a 16-byte access.
template <typename T>
constexpr int kWide = 16 / int(sizeof(T));

// Whether rows of `stride` values starting at `data` can be read 16 bytes at a time.
template <typename T>
inline bool wide_rows(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kWide<T> == 0;
}

// Sum or maximum over the warp in a fixed order, the same in every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits >>= 1) x += __shfl_xor_sync(kAllLanes, x, bits);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits >>= 1) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, bits));
  return x;
}

// Largest and smallest number of the warp, in every lane.
__device__ __forceinline__ uint32_t warp_max(uint32_t x) {
#if defined(MING_EMU)
  for (int bits = 16; bits > 0; bits >>= 1) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, x, bits);
    x = x > other ? x : other;
  }
  return x;
#else
  return __reduce_max_sync(kAllLanes, x);
#endif
}
__device__ __forceinline__ uint32_t warp_min(uint32_t x) {
  return ~warp_max(~x);
}

// The sum over a block of Threads; every thread calls it, `partial` is shared memory of Threads / 32 floats
// that nobody else uses until the block's next barrier.
template <int Threads>
__device__ __forceinline__ float block_sum(float x, float* partial) {
  x = warp_sum(x);
  if constexpr (Threads > 32) {
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
#pragma unroll
    for (int w = 0; w < Threads / 32; ++w) x += partial[w];
  }
  return x;
}

// Remembers the first fault; the caller then leaves the access out.
__device__ __forceinline__ void report(DeviceStatus* status, Fault fault, int64_t value) {
  if (atomicCAS(&status->fault, 0, int32_t(fault)) == 0) status->value = int32_t(value);
}

// Calls fn with a value of the storage type of `dtype`: float or bf16.
template <typename F>
inline void with_dtype(DType dtype, F&& fn) {
  dtype == DType::f32 ? fn(float{}) : fn(bf16{});
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace ming::gpu
