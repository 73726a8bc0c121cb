// Storage types of tensors and their conversions. No framework types here.
#pragma once

#include <cstdint>
#include <cstring>

// Functions that kernels of both kinds use.
#if defined(__CUDACC__)
#define MING_BOTH __host__ __device__ __forceinline__
#else
#define MING_BOTH static inline
#endif

namespace ming {

enum class DType : int32_t { f32, bf16, f16, u8, i32, i64, other };

constexpr const char* dtype_name(DType t) {
  switch (t) {
    case DType::f32:
      return "float32";
    case DType::bf16:
      return "bfloat16";
    case DType::f16:
      return "float16";
    case DType::u8:
      return "uint8";
    case DType::i32:
      return "int32";
    case DType::i64:
      return "int64";
    default:
      return "an unsupported dtype";
  }
}

// The upper half of an IEEE float32.
struct bf16 {
  uint16_t bits;
};
static_assert(sizeof(bf16) == 2);

MING_BOTH float to_float(float x) {
  return x;
}

MING_BOTH float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// IEEE binary16; weights are read from it, nothing is computed or stored in it.
struct f16 {
  uint16_t bits;
};
static_assert(sizeof(f16) == 2);

MING_BOTH float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude < 0x0400) {  // zero or subnormal: a multiple of 2^-24
    const float f = float(magnitude) * 5.9604644775390625e-8f;
    return sign ? -f : f;
  }
  const uint32_t u = sign | (magnitude >= 0x7c00 ? 0x7f800000u | (magnitude & 0x3ff) << 13
                                                 : (magnitude << 13) + (uint32_t(112) << 23));
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// Round to nearest even; NaN stays NaN.
MING_BOTH bf16 to_bf16(float f) {
#if defined(__CUDA_ARCH__)
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(f));
  return y;
#else
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t((u >> 16) | 0x40u)};
  u += 0x7fffu + ((u >> 16) & 1u);
  return bf16{uint16_t(u >> 16)};
#endif
}

template <typename T>
MING_BOTH T from_float(float f) {
  if constexpr (sizeof(T) == 4)
    return f;
  else
    return to_bf16(f);
}

}  // namespace ming
