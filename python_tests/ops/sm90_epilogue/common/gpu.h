// Stands in for csrc/common/gpu.h: the few device functions of the epilogue, lanes being threads of the CPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/device_status.h"
#include "common/dtype.h"

uint32_t exchange(uint32_t value, int bits);  // what the lane with this lane's number ^ bits gives

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t all = (uint64_t(b) << 32) | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= uint32_t((all >> (8 * ((selector >> (4 * i)) & 7))) & 0xff) << (8 * i);
  return result;
}

#define __shfl_xor_sync(lanes, value, bits) exchange(value, bits)
#define __byte_perm permute_bytes
#define __expf(x) std::exp(x)
#define __fdividef(x, y) ((x) / (y))

namespace ming::gpu {

inline uint32_t pack_bf16(float low, float high) {
  return to_bf16(low).bits | uint32_t(to_bf16(high).bits) << 16;
}

inline void report(DeviceStatus* status, Fault fault, int64_t value) {
  status->fault = int32_t(fault);
  status->value = int32_t(value);
}

}  // namespace ming::gpu
