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
  if (slots.size[slot] < bytes || !slots.data[slot]) {
    std::free(slots.data[slot]);
    slots.size[slot] = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    slots.data[slot] = std::aligned_alloc(4096, slots.size[slot] ? slots.size[slot] : 4096);
    if (!slots.data[slot]) {
      slots.size[slot] = 0;
      throw std::bad_alloc();
    }
  }
  return slots.data[slot];
}

}  // namespace ming
