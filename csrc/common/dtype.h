// Storage types of tensors and their conversions. No framework types here.
#pragma once

#include <cstdint>
#include <cstring>

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

static inline float to_float(float x) {
  return x;
}

static inline float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// Round to nearest even; NaN stays NaN.
static inline bf16 to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t((u >> 16) | 0x40u)};
  u += 0x7fffu + ((u >> 16) & 1u);
  return bf16{uint16_t(u >> 16)};
}

template <typename T>
T from_float(float f);
template <>
inline float from_float<float>(float f) {
  return f;
}
template <>
inline bf16 from_float<bf16>(float f) {
  return to_bf16(f);
}

}  // namespace ming
