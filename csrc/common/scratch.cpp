#include "common/scratch.h"

#include <cstdlib>
#include <new>

namespace ming {
namespace {

struct Slots {
  void* data[8] = {};
  size_t size[8] = {};
  ~Slots() {
    for (void* p : data) std::free(p);
  }
};

}  // namespace

void* scratch_bytes(int slot, size_t bytes) {
  thread_local Slots slots;
  void*& data = slots.data[slot];
  size_t& size = slots.size[slot];
  if (size < bytes || !data) {
    std::free(data);
    size = (bytes + bytes / 4) / 4096 * 4096 + 4096;
    data = std::aligned_alloc(4096, size);
    if (!data) throw std::bad_alloc();  // the next request tries again
  }
  return data;
}

}  // namespace ming
