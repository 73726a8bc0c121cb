// The check of packed weights, shared by the ops that multiply with them.
#pragma once

#include "binding/check.h"

namespace ming::binding {

// A packed weight of n outputs and k inputs as gemm.h defines it: [packed elements], or where `count` names a
// dimension [count, packed elements], one weight per row.
TensorView packed_weight(Call& call, const char* name, py::handle object, std::initializer_list<DType> dtypes,
                         const char* count, int64_t n, int64_t k, bool gated);

}  // namespace ming::binding
