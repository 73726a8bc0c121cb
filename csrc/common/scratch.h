// Thread-local work memory that grows and is reused from call to call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ming {

// 64-byte aligned, uninitialised memory of at least `bytes`, valid until this thread asks for the same slot
// again. A kernel that needs several buffers at once uses several slots (0..7); the calling thread works
// in its own parallel_for too, so the body needs other slots than the code around it. Throws std::bad_alloc.
void* scratch_bytes(int slot, size_t bytes);

template <typename T>
static inline T* scratch(int slot, int64_t count) {
  return static_cast<T*>(scratch_bytes(slot, size_t(count) * sizeof(T)));
}

}  // namespace ming
