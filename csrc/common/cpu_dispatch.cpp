#include "common/cpu_dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace ming {

Isa best_isa() {
#if defined(__x86_64__)
  static const Isa best = [] {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512bf16") &&
        __builtin_cpu_supports("avx512vnni"))
      return Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
        __builtin_cpu_supports("f16c"))
      return Isa::avx2;
    return Isa::portable;
  }();
  return best;
#else
  return Isa::portable;
#endif
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

Isa isa_from_name(const char* name) {
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512})
    if (std::strcmp(name, isa_name(isa)) == 0) return isa;
  throw std::invalid_argument(std::string("isa: expected portable, avx2 or avx512, got ") + name);
}

static std::atomic<int>& active_slot() {
  static std::atomic<int> slot = [] {
    const char* name = std::getenv("MING_RT_ISA");
    if (!name || !*name) return int(best_isa());
    Isa wanted = isa_from_name(name);
    return int(wanted) < int(best_isa()) ? int(wanted) : int(best_isa());
  }();
  return slot;
}

Isa active_isa() {
  return Isa(active_slot().load(std::memory_order_relaxed));
}

void set_isa(Isa isa) {
  if (int(isa) > int(best_isa()))
    throw std::invalid_argument(std::string("isa: this CPU supports up to ") + isa_name(best_isa()) +
                                ", got " + isa_name(isa));
  active_slot().store(int(isa), std::memory_order_relaxed);
}

}  // namespace ming
