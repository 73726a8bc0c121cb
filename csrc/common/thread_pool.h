// One process-wide pool of worker threads for the CPU kernels.
#pragma once

#include <cstdint>

namespace ming {

// Number of threads a parallel region uses, the caller included: MING_RT_THREADS, else the usable cores.
int num_threads();            // throws std::invalid_argument when MING_RT_THREADS is not 1..1024
void set_num_threads(int n);  // 1..1024; throws std::invalid_argument

// A non-owning reference to a callable void(int64_t begin, int64_t end).
struct RangeFn {
  void* object;
  void (*call)(void* object, int64_t begin, int64_t end);
};

// Runs fn over [0, n) in chunks of `grain`, handed out dynamically, and returns when all are done. Concurrent
// callers take turns; a call made from inside a region runs serially. An exception thrown by fn is rethrown
// to the caller once all chunks have ended.
void parallel_for_ref(int64_t n, int64_t grain, RangeFn fn);

// Items per chunk so that a chunk is worth handing to another thread; `work` is the cost of one item in
// elements read and written once.
static inline int64_t grain_of(int64_t work) {
  return 1 + 16384 / (work + 1);
}

template <typename F>
static inline void parallel_for(int64_t n, int64_t grain, F&& fn) {
  RangeFn ref{const_cast<void*>(static_cast<const void*>(&fn)), [](void* object, int64_t begin, int64_t end) {
                (*static_cast<decltype(&fn)>(object))(begin, end);
              }};
  parallel_for_ref(n, grain, ref);
}

}  // namespace ming
