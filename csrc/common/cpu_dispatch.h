// Run-time choice between the instruction sets one kernel source was compiled for.
//
// Every csrc/ops/<op>/<op>_cpu.cpp is compiled once per ISA with MING_ISA = portable | avx2 | avx512 as its
// namespace. `MING_CPU_OP(foo, FooParams)` in the op's header declares the three forms and `cpu::foo`, which
// calls the form of the active ISA.
#pragma once

namespace ming {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

Isa best_isa();         // what this CPU can run (avx512 means F, BW, CD, DQ, VL, BF16 and VNNI)
Isa active_isa();       // best_isa(), unless MING_RT_ISA or set_isa() lowered it
void set_isa(Isa isa);  // throws std::invalid_argument when the CPU lacks it
const char* isa_name(Isa isa);
Isa isa_from_name(const char* name);  // throws std::invalid_argument

}  // namespace ming

#if defined(__x86_64__)
#define MING_CPU_OP(name, Params)     \
  namespace portable {                \
  void name(const Params& p);         \
  }                                   \
  namespace avx2 {                    \
  void name(const Params& p);         \
  }                                   \
  namespace avx512 {                  \
  void name(const Params& p);         \
  }                                   \
  namespace cpu {                     \
  inline void name(const Params& p) { \
    switch (active_isa()) {           \
      case Isa::avx512:               \
        return avx512::name(p);       \
      case Isa::avx2:                 \
        return avx2::name(p);         \
      default:                        \
        return portable::name(p);     \
    }                                 \
  }                                   \
  }
#else
#define MING_CPU_OP(name, Params)     \
  namespace portable {                \
  void name(const Params& p);         \
  }                                   \
  namespace cpu {                     \
  inline void name(const Params& p) { \
    portable::name(p);                \
  }                                   \
  }
#endif
