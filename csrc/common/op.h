// Declares the forms of an op: one CPU form per instruction set (cpu_dispatch.h) and one CUDA form.
//
// `MING_OP(foo, FooParams)` gives cpu::foo(p) and cuda::foo(p, stream). The CUDA form lives in
// csrc/ops/<op>/<op>_cuda.cu; it is linked into ming_rt._cuda (nvcc) and ming_rt._emu (csrc/emu), the CPU
// forms into ming_rt._cpu. An op without a CUDA form says `MING_CPU_OP` instead.
#pragma once

#include "common/cpu_dispatch.h"

namespace ming {

using Stream = void*;  // a cudaStream_t; kernels of one stream run in order

}  // namespace ming

#define MING_OP(name, Params)                \
  MING_CPU_OP(name, Params)                  \
  namespace cuda {                           \
  void name(const Params& p, Stream stream); \
  }
