#include "common/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ming {
namespace {

int usable_cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set) > 0 ? CPU_COUNT(&set) : 1;
  unsigned n = std::thread::hardware_concurrency();
  return n ? int(n) : 1;
}

constexpr int kMaxThreads = 1024;

int initial_threads() {
  const char* text = std::getenv("MING_RT_THREADS");
  if (!text || !*text) {
    const int cores = usable_cores();
    return cores < kMaxThreads ? cores : kMaxThreads;
  }
  char* end = nullptr;
  const long n = std::strtol(text, &end, 10);
  if (*end || n < 1 || n > kMaxThreads)
    throw std::invalid_argument(std::string("MING_RT_THREADS: expected 1..1024, got ") + text);
  return int(n);
}

inline void cpu_relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

thread_local bool in_region = false;

class Pool {
 public:
  explicit Pool(int threads) : wanted_(threads) {}

  int threads() const { return wanted_.load(std::memory_order_relaxed); }
  void set_threads(int n) { wanted_.store(n, std::memory_order_relaxed); }

  void run(int64_t n, int64_t grain, RangeFn fn) {
    const int64_t chunks = (n + grain - 1) / grain;
    const int want = int(chunks < threads() ? chunks : threads());
    if (want <= 1 || in_region) {
      fn.call(fn.object, 0, n);
      return;
    }
    std::lock_guard<std::mutex> turn(turn_);
    for (; workers_ < want - 1; ++workers_) std::thread([this] { work(); }).detach();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      n_ = n;
      grain_ = grain;
      fn_ = fn;
      error_ = nullptr;
      next_.store(0, std::memory_order_relaxed);
      seats_ = want - 1;
      epoch_.fetch_add(1, std::memory_order_release);
    }
    if (sleepers_.load(std::memory_order_seq_cst) > 0) wake_.notify_all();
    consume();
    {
      // A helper that has not woken up by now is not waited for.
      std::lock_guard<std::mutex> lock(mutex_);
      seats_ = 0;
    }
    // A helper that lost its core needs one to finish: after a moment, offer this one.
    for (int i = 0; busy_.load(std::memory_order_acquire) != 0; ++i)
      i < kSpins / 10 ? cpu_relax() : std::this_thread::yield();
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void consume() {
    in_region = true;
    for (;;) {
      const int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
      if (begin >= n_) break;
      const int64_t end = begin + grain_ < n_ ? begin + grain_ : n_;
      try {
        fn_.call(fn_.object, begin, end);
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
      }
    }
    in_region = false;
  }

  // Spins for a moment between the back-to-back regions of one model step, then sleeps.
  void work() {
    uint64_t seen = 0;
    for (;;) {
      for (int i = 0; i < kSpins && epoch_.load(std::memory_order_acquire) == seen; ++i) cpu_relax();
      {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return epoch_.load(std::memory_order_acquire) != seen; });
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
        seen = epoch_.load(std::memory_order_acquire);
        if (seats_ == 0) continue;
        --seats_;
        busy_.fetch_add(1, std::memory_order_acq_rel);
      }
      consume();
      busy_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  static constexpr int kSpins = 20000;  // about 0.2-0.5 ms
  std::atomic<int> wanted_;
  std::mutex turn_, mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> epoch_{0};
  std::atomic<int> sleepers_{0}, busy_{0};
  std::atomic<int64_t> next_{0};
  int workers_ = 0;  // started so far; guarded by turn_
  int seats_ = 0;    // helpers the running region still takes in
  int64_t n_ = 0, grain_ = 1;
  RangeFn fn_{nullptr, nullptr};
  std::exception_ptr error_;
};

Pool* instance = nullptr;

// Leaked on purpose: detached workers may outlive static destruction. A forked child has no workers, so it
// starts over with a fresh pool.
Pool& pool() {
  [[maybe_unused]] static const bool made = [] {
    instance = new Pool(initial_threads());
    pthread_atfork(nullptr, nullptr, [] {
      instance = new Pool(instance->threads());
      in_region = false;
    });
    return true;
  }();
  return *instance;
}

}  // namespace

int num_threads() {
  return pool().threads();
}

void set_num_threads(int n) {
  if (n < 1 || n > kMaxThreads)
    throw std::invalid_argument("num_threads: expected 1..1024, got " + std::to_string(n));
  pool().set_threads(n);
}

void parallel_for_ref(int64_t n, int64_t grain, RangeFn fn) {
  if (n <= 0) return;
  pool().run(n, grain < 1 ? 1 : grain, fn);
}

}  // namespace ming
