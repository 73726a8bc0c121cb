// Checks shared by the ops that multiply with packed weights and by the steps of the mixture of experts.
#pragma once

#include "binding/check.h"
#include "ops/gemm/gemm.h"

namespace ming::binding {

// A packed weight of n outputs and k inputs as gemm.h defines it for this module's devices: [packed
// elements], or where `count` names a dimension [count, packed elements], one weight per row.
TensorView packed_weight(Call& call, const char* name, py::handle object, std::initializer_list<DType> dtypes,
                         const char* count, int64_t n, int64_t k, bool gated);

// The same of any format: quantised data are bytes, and `scales` a bfloat16 tensor of the same count.
struct PackedView {
  TensorView data, scales;  // scales: empty where the format is plain
  WeightFormat format;
};
PackedView packed_weight(Call& call, const char* name, py::handle object, py::handle scales, int format,
                         std::initializer_list<DType> dtypes, const char* count, int64_t n, int64_t k,
                         bool gated);

constexpr int kMaxExperts = 65535;

// Every value from 0 to limit - 1; for values the host can read.
inline void in_range(Call& call, const char* name, const int32_t* values, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < 0 || values[i] >= limit)
      call.fail(std::string(name) + ": expected values in 0.." + std::to_string(limit - 1) + ", got " +
                std::to_string(values[i]));
}

}  // namespace ming::binding
