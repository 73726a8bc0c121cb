#include "emu/emu.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include "common/device_status.h"

namespace ming {

DeviceStatus* device_status() {
  static DeviceStatus status{};
  return &status;
}

DeviceStatus* known_device_status() {
  return device_status();
}

namespace emu {

Index thread_index, block_index;
dim3 block_size, grid_size;

namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kMaxShared =
    99 << 10;  // what every device of compute capability 8.0 and up can give a block
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 512 << 10;
#else
constexpr size_t kStackBytes = 128 << 10;
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers on the stack, swaps the stack pointer, restores.
extern "C" void ming_emu_switch(void** from, void* to);
asm(R"(
.text
.globl ming_emu_switch
.hidden ming_emu_switch
.type ming_emu_switch,@function
ming_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ming_emu_switch,.-ming_emu_switch
)");
#endif

enum class State { ready, block_wait, warp_wait, done };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  char* stack = nullptr;
#if defined(__x86_64__)
  void* sp = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
  State state = State::done;
  const char* file = nullptr;  // where it waits
  int line = 0;
  unsigned parity = 0;  // of its next warp operation
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // end of each committed group in `copies`
};

struct Warp {
  unsigned char slots[2][32][32];
  uint32_t alive, waiting;
  uint32_t members[2];  // lanes of the last operation on each set of slots
};

struct Shared {
  const void* key;
  std::unique_ptr<unsigned char[]> memory;  // with room to align
  void* at;
};

// One block at a time; all of it belongs to the thread that holds `turn`.
struct Machine {
  std::mutex turn;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Shared> shared;
  std::vector<uint32_t> order;
  void* dynamic = nullptr;
  bool seeded = false;  // threads run in an order of MING_EMU_SEED
  int current = 0, count = 0, alive = 0, at_barrier = 0;
  Body body{};
  std::string problem;
#if defined(__x86_64__)
  void* sp = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;
  const void* host_stack = nullptr;
  size_t host_stack_bytes = 0;
};

Machine machine;

void sanitizer_leave([[maybe_unused]] void** fake, [[maybe_unused]] const void* stack,
                     [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake, stack, bytes);
#endif
}

void sanitizer_enter([[maybe_unused]] void* fake, [[maybe_unused]] const void** stack,
                     [[maybe_unused]] size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, stack, bytes);
#endif
}

// From the fiber that runs to the scheduler.
void to_scheduler(bool for_good) {
  Machine& m = machine;
  Fiber& f = m.fibers[m.current];
  sanitizer_leave(for_good ? nullptr : &f.fake_stack, m.host_stack, m.host_stack_bytes);
#if defined(__x86_64__)
  ming_emu_switch(&f.sp, m.sp);
#else
  swapcontext(&f.context, &m.context);
#endif
  sanitizer_enter(f.fake_stack, &m.host_stack, &m.host_stack_bytes);
}

[[noreturn]] void give_up(const std::string& problem) {
  machine.problem = problem;
  for (;;) to_scheduler(true);  // the scheduler never comes back to this launch
}

void release_barrier() {
  Machine& m = machine;
  if (m.at_barrier == 0 || m.at_barrier < m.alive) return;
  for (int i = 0; i < m.count; ++i)
    if (m.fibers[i].state == State::block_wait) m.fibers[i].state = State::ready;
  m.at_barrier = 0;
}

void release_warp(int index) {
  Machine& m = machine;
  Warp& w = m.warps[index];
  if (!w.waiting || w.waiting != w.alive) return;
  for (int lane = 0; lane < 32; ++lane) {
    Fiber& f = m.fibers[32 * index + lane];
    if (!(w.waiting >> lane & 1)) continue;
    f.state = State::ready;
    w.members[f.parity ^ 1] = w.waiting;
  }
  w.waiting = 0;
}

std::string place(const char* file, int line) {
  return std::string(file) + ":" + std::to_string(line);
}

// The first place in which a waiting thread of [begin, end) stands, to compare others with.
void same_place(int begin, int end, State state, const char* file, int line) {
  for (int i = begin; i < end; ++i) {
    const Fiber& f = machine.fibers[i];
    if (i == machine.current || f.state != state) continue;
    if (f.line != line || std::strcmp(f.file, file) != 0)
      give_up("threads diverge: one waits at " + place(f.file, f.line) + ", another at " + place(file, line));
    return;
  }
}

extern "C" void ming_emu_fiber() {
  Machine& m = machine;
  sanitizer_enter(nullptr, &m.host_stack, &m.host_stack_bytes);
  m.body.call(m.body.object);
  Fiber& f = m.fibers[m.current];
  f.state = State::done;
  --m.alive;
  m.warps[m.current / 32].alive &= ~(1u << m.current % 32);
  release_barrier();
  release_warp(m.current / 32);
  to_scheduler(true);
  std::abort();  // a fiber that ended is not resumed
}

void start(Fiber& f) {
  if (!f.stack) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    f.stack = static_cast<char*>(memory);
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(f.stack, kStackBytes);  // left over from a launch that was given up
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(f.stack + kStackBytes - 64);
  top[0] = reinterpret_cast<void*>(&ming_emu_fiber);  // popped by ret
  top[1] = nullptr;
  for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
  f.sp = top - 6;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = kStackBytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, ming_emu_fiber, 0);
#endif
  f.state = State::ready;
  f.parity = 0;
  f.copies.clear();
  f.groups.clear();
}

void run(int index) {
  Machine& m = machine;
  Fiber& f = m.fibers[index];
  m.current = index;
  const uint32_t i = uint32_t(index);
  thread_index = {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y};
  sanitizer_leave(&m.fake_stack, f.stack, kStackBytes);
#if defined(__x86_64__)
  ming_emu_switch(&m.sp, f.sp);
#else
  swapcontext(&m.context, &f.context);
#endif
  sanitizer_enter(m.fake_stack, nullptr, nullptr);
}

// 128-byte aligned, every byte 0xff (a NaN), watched by AddressSanitizer to the byte.
void* poisoned(std::unique_ptr<unsigned char[]>& memory, size_t bytes) {
  memory.reset(new unsigned char[bytes + 256]);
  unsigned char* at =
      reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(memory.get()) + 127) & ~uintptr_t(127));
  std::memset(at, 0xff, bytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(at + bytes, 128);
#endif
  return at;
}

void run_block(size_t shared_bytes) {
  Machine& m = machine;
  m.shared.clear();
  std::unique_ptr<unsigned char[]> dynamic;
  m.dynamic = poisoned(dynamic, shared_bytes);
  m.alive = m.count;
  m.at_barrier = 0;
  for (int i = 0; i < m.count; ++i) start(m.fibers[i]);
  for (int w = 0; w * 32 < m.count; ++w) {
    const int lanes = std::min(32, m.count - 32 * w);
    m.warps[w].alive = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
    m.warps[w].waiting = 0;
  }
  while (m.alive > 0) {
    bool moved = false;
    const int turn = m.seeded ? 32 : m.count;  // threads that go on as far as they come
    for (int begin = 0; begin < m.count; begin += turn)
      for (bool again = true; again;) {
        again = false;
        for (int i = begin; i < std::min(begin + turn, m.count); ++i) {
          if (m.fibers[m.order[i]].state != State::ready) continue;
          run(int(m.order[i]));
          moved = again = true;
          if (!m.problem.empty()) return;
        }
      }
    if (moved) continue;
    std::string waiting;
    for (int i = 0; i < m.count && waiting.empty(); ++i)
      if (m.fibers[i].state != State::done) waiting = place(m.fibers[i].file, m.fibers[i].line);
    m.problem = "deadlock: not all threads reach the barrier or warp operation at " + waiting;
    return;
  }
}

}  // namespace

void block_barrier(const char* file, int line) {
  Machine& m = machine;
  same_place(0, m.count, State::block_wait, file, line);
  Fiber& f = m.fibers[m.current];
  f.state = State::block_wait;
  f.file = file;
  f.line = line;
  ++m.at_barrier;
  release_barrier();
  to_scheduler(false);
}

const unsigned char* exchange(const void* value, size_t bytes, uint32_t lane_mask, const char* file,
                              int line) {
  Machine& m = machine;
  if (lane_mask != 0xffffffffu) give_up("a warp operation at " + place(file, line) + " leaves lanes out");
  const int index = m.current / 32, lane = m.current % 32;
  Warp& w = m.warps[index];
  same_place(32 * index, std::min(32 * index + 32, m.count), State::warp_wait, file, line);
  Fiber& f = m.fibers[m.current];
  // Two sets of slots: a lane can be one operation ahead of a lane that still reads, never two.
  auto& slots = w.slots[f.parity];
  f.parity ^= 1;
  std::memcpy(slots[lane], value, bytes);
  f.state = State::warp_wait;
  f.file = file;
  f.line = line;
  w.waiting |= 1u << lane;
  release_warp(index);
  to_scheduler(false);
  return slots[0];
}

uint32_t members() {
  return machine.warps[machine.current / 32].members[machine.fibers[machine.current].parity ^ 1];
}

int lane() {
  return machine.current % 32;
}

void expect_aligned(const void* at, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(at) % bytes != 0)
    give_up("a vector of " + std::to_string(bytes) + " bytes at an address that is no multiple of that");
}

void* shared_block(const void* key, size_t bytes) {
  for (const Shared& s : machine.shared)
    if (s.key == key) return s.at;
  Shared s{key, nullptr, nullptr};
  s.at = poisoned(s.memory, bytes);
  machine.shared.push_back(std::move(s));
  return machine.shared.back().at;
}

void* dynamic_shared() {
  return machine.dynamic;
}

void async_copy(void* to, const void* from, size_t bytes) {
  machine.fibers[machine.current].copies.push_back({to, from, bytes});
}

void async_commit() {
  Fiber& f = machine.fibers[machine.current];
  f.groups.push_back(f.copies.size());
}

void async_wait(int groups_in_flight) {
  Fiber& f = machine.fibers[machine.current];
  if (int(f.groups.size()) <= groups_in_flight) return;
  const size_t finished = f.groups.size() - size_t(groups_in_flight), end = f.groups[finished - 1];
  for (size_t i = 0; i < end; ++i) {
    const Copy& c = f.copies[i];
    if (c.from)
      std::memcpy(c.to, c.from, c.bytes);
    else
      std::memset(c.to, 0, c.bytes);
  }
  f.copies.erase(f.copies.begin(), f.copies.begin() + long(end));
  f.groups.erase(f.groups.begin(), f.groups.begin() + long(finished));
  for (size_t& group : f.groups) group -= end;
}

void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, Body body) {
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (threads < 1 || threads > kMaxThreads || shared_bytes > kMaxShared || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error(std::string(name) + ": launch refused: " + std::to_string(threads) +
                             " threads, " + std::to_string(shared_bytes) + " bytes of shared memory");
  Machine& m = machine;
  std::lock_guard<std::mutex> turn(m.turn);
  m.count = int(threads);
  m.fibers.resize(kMaxThreads);
  m.warps.resize(kMaxThreads / 32);
  m.body = body;
  m.problem.clear();
  const char* seed = std::getenv("MING_EMU_SEED");
  m.seeded = seed && *seed;
  m.order.resize(threads);
  std::iota(m.order.begin(), m.order.end(), 0u);
  if (m.seeded) {  // the warps, and the lanes of each
    std::mt19937 random(unsigned(std::atoi(seed)));
    std::vector<uint32_t> rank(threads);
    std::iota(rank.begin(), rank.end(), 0u);
    std::shuffle(rank.begin(), rank.end(), random);
    if (threads % 32) rank[threads / 32 * 32] = uint32_t(threads);  // the warp that is not full stays last
    std::sort(m.order.begin(), m.order.end(), [&](uint32_t a, uint32_t b) {
      return a / 32 == b / 32 ? rank[a] < rank[b] : rank[a / 32 * 32] < rank[b / 32 * 32];
    });
  }
  block_size = block;
  grid_size = grid;
  for (uint32_t z = 0; z < grid.z; ++z)
    for (uint32_t y = 0; y < grid.y; ++y)
      for (uint32_t x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        run_block(shared_bytes);
        m.shared.clear();
        if (m.problem.empty()) continue;
        throw std::runtime_error(std::string(name) + ": block (" + std::to_string(x) + ", " +
                                 std::to_string(y) + ", " + std::to_string(z) + "), thread " +
                                 std::to_string(m.current) + ": " + m.problem);
      }
}

}  // namespace emu
}  // namespace ming
