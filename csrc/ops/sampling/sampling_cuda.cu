// Three launches: mark the ids the history changes, reduce every chunk of 128 ids, choose with one block per
// row.
//
// Probabilities are integers, e^((y - max) / temperature) in units of 2^-40: their sums are exact, so that
// neither the order of atomics nor the shape of a reduction shows in the result. Chunks whose largest value
// is out of reach are skipped unread, which leaves few of them to filters and draws over real logits.
#include "common/gpu.h"
#include "ops/sampling/sampling.h"

namespace ming::cuda {
namespace {

using namespace ming::gpu;

constexpr int kChunk = int(kSampleChunk), kWarp = 32;
constexpr int kMarkThreads = 512, kReduceThreads = 256, kThreads = 1024;
constexpr int kBlockChunks = 2 * kReduceThreads / kWarp;  // of a reducing block
constexpr int kBinBits = 11, kBins = 1 << kBinBits;
constexpr float kInf = __builtin_inff();
constexpr float kUnits = 1099511627776.0f;  // 2^40
constexpr float kReach = 28.0f;             // e^-28 is less than a unit

template <typename T>
__device__ T least(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
__device__ T most(T a, T b) {
  return a < b ? b : a;
}
struct Min {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return least(a, b);
  }
};
struct Max {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return most(a, b);
  }
};
struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Row {
  const float* x;  // [V]
  float* y;        // [V], the scores after the penalties, where `changed`
  uint8_t* flags;  // [V]: 1 = penalty, 2 = banned
  uint64_t *sums, *heads;
  float *top, *raw_max, *raw_sum;  // of each chunk: max y, max x, sum of e^(x - max x)
  const int64_t* history;
  int64_t length, chunks;
  bool changed;

  __device__ const float* scores() const { return changed ? y : x; }
};

__device__ Row row_of(const SampleParams& p, int64_t row, DeviceStatus* status) {
  Row r;
  r.x = p.logits + row * p.logits_stride;
  r.chunks = (p.vocab + kChunk - 1) / kChunk;
  r.sums = reinterpret_cast<uint64_t*>(static_cast<char*>(p.workspace) + row * sample_row_bytes(p.vocab));
  r.heads = r.sums + r.chunks;
  r.top = reinterpret_cast<float*>(r.heads + r.chunks);
  r.raw_max = r.top + r.chunks;
  r.raw_sum = r.raw_max + r.chunks;
  r.y = r.raw_sum + 2 * r.chunks;
  r.flags = reinterpret_cast<uint8_t*>(r.y + r.chunks * kChunk);
  const int64_t begin = p.history_bounds[2 * row], end = p.history_bounds[2 * row + 1];
  const bool inside = begin >= 0 && begin <= end && end <= p.history_length;
  if (!inside && threadIdx.x == 0) report(status, Fault::history, end);
  r.history = p.history + (inside ? begin : 0);
  r.length = inside ? end - begin : 0;
  r.changed = r.length > 0 && (p.repetition_penalty[row] != 1.0f || p.ngram_size[row] > 0);
  return r;
}

// Whether an n-gram of the history that begins at i would be completed by the id after its last n - 1 ids.
__device__ bool repeats(const int64_t* history, int64_t length, int64_t n, int64_t i) {
  const int64_t* last = history + length - (n - 1);
  int64_t same = 0;
  while (same < n - 1 && history[i + same] == last[same]) ++same;
  return same == n - 1;
}

__global__ void __launch_bounds__(kMarkThreads) mark_kernel(const SampleParams p, DeviceStatus* status) {
  const Row r = row_of(p, blockIdx.x, status);
  if (!r.changed) return;
  const auto known = [&](int64_t id) { return id >= 0 && id < p.vocab; };
  for (int64_t i = threadIdx.x * 16; i < r.chunks * kChunk; i += kMarkThreads * 16)
    store(r.flags + i, Vec<uint8_t, 16>{});
  __syncthreads();
  for (int64_t i = threadIdx.x; i < r.length; i += kMarkThreads)
    if (known(r.history[i])) r.flags[r.history[i]] = 1;
  __syncthreads();
  const int64_t n = p.ngram_size[blockIdx.x];
  for (int64_t i = threadIdx.x; n > 0 && i + n <= r.length; i += kMarkThreads) {
    const int64_t id = r.history[i + n - 1];
    if (known(id) && repeats(r.history, r.length, n, i)) r.flags[id] = 2;
  }
}

__global__ void __launch_bounds__(kReduceThreads) reduce_kernel(const SampleParams p, DeviceStatus* status) {
  const Row r = row_of(p, blockIdx.y, status);
  const int lane = threadIdx.x % kWarp;
  const float penalty = p.repetition_penalty[blockIdx.y];
  const int64_t first = int64_t(blockIdx.x) * kBlockChunks, end = least(first + kBlockChunks, r.chunks);
  for (int64_t c = first + threadIdx.x / kWarp; c < end; c += kReduceThreads / kWarp) {
    float x[kChunk / kWarp], raw_max = -kInf, top = -kInf, sum = 0;
#pragma unroll
    for (int j = 0; j < kChunk / kWarp; ++j) {
      const int64_t id = c * kChunk + j * kWarp + lane;
      x[j] = id < p.vocab ? r.x[id] : -kInf;
      raw_max = fmaxf(raw_max, x[j]);
      float y = x[j];
      if (r.changed && id < p.vocab) {
        const int flag = r.flags[id];
        y = flag == 2 ? -kInf : flag == 0 ? y : y < 0 ? y * penalty : y / penalty;
        r.y[id] = y;
      }
      top = fmaxf(top, y);
    }
    raw_max = warp_max(raw_max);
    top = warp_max(top);
    const float shift = raw_max == -kInf ? 0.0f : raw_max;
#pragma unroll
    for (int j = 0; j < kChunk / kWarp; ++j) sum += expf(x[j] - shift);  // NaN and +inf become NaN
    sum = warp_sum(sum);
    if (lane == 0) {
      r.top[c] = top;
      r.raw_max[c] = raw_max;
      r.raw_sum[c] = sum;
    }
  }
}

// A reduction over the block in a fixed order, the same in every thread.
template <typename T, typename Op>
__device__ T block_reduce(T x, Op op) {
  MING_SHARED(T, partial, [kThreads / kWarp]);
  for (int bits = kWarp / 2; bits > 0; bits >>= 1) x = op(x, __shfl_xor_sync(kAllLanes, x, bits));
  __syncthreads();  // the last reduction has been read
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = partial[0];
  for (int w = 1; w < kThreads / kWarp; ++w) x = op(x, partial[w]);
  return x;
}

__device__ uint64_t warp_scan(uint64_t x) {
  for (int delta = 1; delta < kWarp; delta <<= 1) {
    const uint64_t other = __shfl_up_sync(kAllLanes, x, delta);
    if (int(threadIdx.x) % kWarp >= delta) x += other;
  }
  return x;
}

// The sum over all threads before this one; `total` over all threads.
__device__ uint64_t block_scan(uint64_t x, uint64_t* total) {
  MING_SHARED(uint64_t, warps, [kThreads / kWarp]);
  const uint64_t inclusive = warp_scan(x);
  __syncthreads();  // the last scan has been read
  if (threadIdx.x % kWarp == kWarp - 1) warps[threadIdx.x / kWarp] = inclusive;
  __syncthreads();
  uint64_t before = 0, all = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w == int(threadIdx.x) / kWarp) before = all;
    all += warps[w];
  }
  *total = all;
  return before + inclusive - x;
}

// Unsigned keys in the order of the floats; -0 and +0 are one key.
__device__ uint32_t order_key(float f) {
  const uint32_t u = __float_as_uint(f + 0.0f);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// One row's scores as seen from the largest: `depth` counts the floats between a score and the best one.
struct Scores {
  const float *y, *top;
  int64_t vocab, chunks;
  float best, temperature;

  __device__ uint32_t depth(float value) const { return order_key(best) - order_key(value); }
  __device__ float value(uint32_t depth) const {
    const uint32_t key = order_key(best) - depth;
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
  }
  __device__ uint64_t weight(float value) const {
    return uint64_t(expf((value - best) / temperature) * kUnits);
  }
  // Depth that a score of at least 2^-40 * units reaches at most; generous by more than any rounding.
  __device__ uint32_t depth_of_weight(float units) const {
    const float fall = fminf(kReach, logf(kUnits / units)) + 1e-3f;
    const float least = best - temperature * fall - 1e-6f * (fabsf(best) + temperature * fall);
    return depth(fmaxf(least, -kInf));
  }

  // Calls fn(depth, value, id) for this thread's share of the scores of depth 0..limit.
  template <typename F>
  __device__ void each(uint32_t limit, F&& fn) const {
    for (int64_t c = threadIdx.x / kWarp; c < chunks; c += kThreads / kWarp) {
      if (depth(top[c]) > limit) continue;
      for (int64_t id = c * kChunk + threadIdx.x % kWarp; id < least((c + 1) * kChunk, vocab); id += kWarp)
        if (const uint32_t d = depth(y[id]); d <= limit) fn(d, y[id], id);
    }
  }
};

struct Cut {
  uint32_t
      depth;  // at which the sum of amounts, from depth 0 down, reaches the target; `limit` if it does not
  uint64_t above;  // the sum over smaller depths
};

struct Shared {
  uint32_t low[kBins], high[kBins];  // halves of 64-bit sums
  Cut cut;
  int64_t chunk, id;
  uint64_t before;

  __device__ void add(int bin, uint64_t amount) {
    const uint32_t part = uint32_t(amount), before = atomicAdd(&low[bin], part);
    const uint32_t rest = uint32_t(amount >> 32) + (before + part < before);
    if (rest) atomicAdd(&high[bin], rest);
  }
  __device__ uint64_t sum(int bin) const { return uint64_t(high[bin]) << 32 | low[bin]; }
};

// Radix select. each(add) calls add(depth, amount) for this thread's share of the values of depth 0..limit.
template <typename Each>
__device__ Cut select(Shared& m, uint32_t limit, uint64_t target, Each&& each) {
  Cut cut{0, 0};
  for (int shift = most(32 - __clz(limit) - kBinBits, 0), bits = kBinBits;;) {
    for (int b = threadIdx.x; b < kBins; b += kThreads) m.low[b] = m.high[b] = 0;
    if (threadIdx.x == 0) m.cut = {kBins, 0};
    __syncthreads();
    each([&](uint32_t d, uint64_t amount) {
      if (uint64_t(d) >> (shift + bits) == cut.depth) m.add(d >> shift & ((1 << bits) - 1), amount);
    });
    __syncthreads();
    const int mine = 2 * threadIdx.x;
    const uint64_t first = m.sum(mine), both = first + m.sum(mine + 1);
    uint64_t all;
    const uint64_t before = cut.above + block_scan(both, &all);
    if (before < target && target <= before + both)
      m.cut =
          before + first >= target ? Cut{uint32_t(mine), before} : Cut{uint32_t(mine) + 1, before + first};
    __syncthreads();
    const Cut next = m.cut;
    __syncthreads();
    if (next.depth == kBins) return {limit, 0};
    cut = {cut.depth << bits | next.depth, next.above};
    if (shift == 0) return cut;
    bits = least(shift, kBinBits);
    shift -= bits;
  }
}

// The first id, in id order, at which the running sum of amount(depth, value, id) over the scores of depth
// 0..limit exceeds target(sum over all of them), which is less than that sum.
template <typename Amount, typename Target>
__device__ int64_t find(Shared& m, const Scores& s, uint64_t* sums, uint32_t limit, Amount&& amount,
                        Target&& target) {
  const int lane = threadIdx.x % kWarp;
  const auto at = [&](int64_t id) {
    const uint32_t d = id < s.vocab ? s.depth(s.y[id]) : ~0u;
    return d <= limit && id < s.vocab ? uint64_t(amount(d, s.y[id], id)) : uint64_t(0);
  };
  for (int64_t c = threadIdx.x / kWarp; c < s.chunks; c += kThreads / kWarp) {
    uint64_t sum = 0;
    if (s.depth(s.top[c]) <= limit)
      for (int j = 0; j < kChunk / kWarp; ++j) sum += at(c * kChunk + j * kWarp + lane);
    for (int bits = kWarp / 2; bits > 0; bits >>= 1) sum += __shfl_xor_sync(kAllLanes, sum, bits);
    if (lane == 0) sums[c] = sum;
  }
  if (threadIdx.x == 0) m.chunk = m.before = 0;
  __syncthreads();
  const int64_t share = (s.chunks + kThreads - 1) / kThreads;
  const int64_t begin = least(threadIdx.x * share, s.chunks), end = least(begin + share, s.chunks);
  uint64_t mine = 0, total;
  for (int64_t c = begin; c < end; ++c) mine += sums[c];
  uint64_t before = block_scan(mine, &total);
  const uint64_t goal = target(total);
  if (before <= goal && goal < before + mine) {
    int64_t c = begin;
    for (; before + sums[c] <= goal; ++c) before += sums[c];
    m.chunk = c;
    m.before = before;
  }
  __syncthreads();
  if (threadIdx.x < kWarp) {
    const int64_t first = m.chunk * kChunk;
    int64_t id = first;
    before = m.before;
    for (int j = 0; j < kChunk / kWarp; ++j) {
      const uint64_t sum = before + warp_scan(at(first + j * kWarp + lane));
      const uint32_t past = __ballot_sync(kAllLanes, sum > goal);
      if (past) {
        id = first + j * kWarp + __ffs(past) - 1;
        break;
      }
      before = __shfl_sync(kAllLanes, sum, kWarp - 1);
    }
    if (lane == 0) m.id = id;
  }
  __syncthreads();
  return m.id;
}

__device__ int64_t draw(Shared& m, const SampleParams& p, int64_t row, const Scores& s, uint64_t* sums) {
  const int64_t k = p.top_k[row];
  const float top_p = p.top_p[row];
  uint32_t limit = s.depth_of_weight(1.0f);
  if (k > 0 && k < s.vocab) {
    // The k-th largest of the chunks' best scores bounds the k-th largest score from below.
    if (k <= s.chunks)
      limit = select(m, limit, uint64_t(k), [&](auto&& add) {
                for (int64_t c = threadIdx.x; c < s.chunks; c += kThreads)
                  if (const uint32_t d = s.depth(s.top[c]); d <= limit) add(d, uint64_t(1));
              }).depth;
    limit = select(m, limit, uint64_t(k), [&](auto&& add) {
              s.each(limit, [&](uint32_t d, float, int64_t) { add(d, uint64_t(1)); });
            }).depth;
  }
  int64_t last_tie = s.vocab;
  if (top_p < 1.0f) {
    uint64_t mass = 0;
    s.each(limit, [&](uint32_t, float y, int64_t) { mass += s.weight(y); });
    mass = block_reduce(mass, Sum{});
    const uint64_t target = most(uint64_t(1), least(mass, uint64_t(ceil(double(top_p) * double(mass)))));
    // All scores that weigh less than (mass - target) / V together weigh less than mass - target: none is
    // needed.
    limit = least(limit, s.depth_of_weight(fmaxf(1.0f, float(mass - target) / float(s.vocab))));
    const Cut cut = select(m, limit, target, [&](auto&& add) {
      s.each(limit, [&](uint32_t d, float y, int64_t) { add(d, s.weight(y)); });
    });
    limit = cut.depth;
    const uint64_t one = most(uint64_t(1), s.weight(s.value(limit))),
                   ties = (target - cut.above + one - 1) / one;
    last_tie = find(
        m, s, sums, limit, [&](uint32_t d, float, int64_t) { return d == limit; },
        [&](uint64_t count) { return least(most(ties, uint64_t(1)), count) - 1; });
  }
  return find(
      m, s, sums, limit,
      [&](uint32_t d, float y, int64_t id) {
        return d < limit || id <= last_tie ? s.weight(y) : uint64_t(0);
      },
      [&](uint64_t total) {
        return least(uint64_t(double(p.uniform[row]) * double(total)), most(total, uint64_t(1)) - 1);
      });
}

// The lowest id of the best score.
__device__ int64_t greedy(const Scores& s) {
  int64_t chunk = s.chunks, id = s.vocab;
  for (int64_t c = threadIdx.x; c < s.chunks && chunk == s.chunks; c += kThreads)
    if (s.top[c] == s.best) chunk = c;
  chunk = block_reduce(chunk, Min{});
  const int64_t mine = chunk * kChunk + threadIdx.x;
  if (threadIdx.x < kChunk && mine < s.vocab && s.y[mine] == s.best) id = mine;
  return block_reduce(id, Min{});
}

// The num_top largest raw logits: the best of each chunk, the best chunk, and that chunk again without it.
__device__ void top_logprobs(const SampleParams& p, int64_t row, const Row& r, float log_sum) {
  const auto rank = [&](int64_t id) {
    return uint64_t(order_key(r.x[id])) << 32 | (0xffffffffu - uint32_t(id));
  };
  const auto refresh = [&](int64_t c, uint64_t below) {  // by one warp
    uint64_t best = 0;
    for (int64_t id = c * kChunk + threadIdx.x % kWarp; id < least((c + 1) * kChunk, p.vocab); id += kWarp)
      if (rank(id) < below) best = most(best, rank(id));
    for (int bits = kWarp / 2; bits > 0; bits >>= 1)
      best = most(best, __shfl_xor_sync(kAllLanes, best, bits));
    if (threadIdx.x % kWarp == 0) r.heads[c] = best;
  };
  for (int64_t c = threadIdx.x / kWarp; c < r.chunks; c += kThreads / kWarp) refresh(c, ~uint64_t(0));
  for (int32_t n = 0; n < p.num_top; ++n) {
    __syncthreads();
    uint64_t best = 0;
    for (int64_t c = threadIdx.x; c < r.chunks; c += kThreads) best = most(best, r.heads[c]);
    best = block_reduce(best, Max{});
    const int64_t id = 0xffffffffu - uint32_t(best);
    if (threadIdx.x == 0) {
      p.top_ids[row * p.num_top + n] = id;
      p.top_logprob[row * p.num_top + n] = r.x[id] - log_sum;
    }
    if (threadIdx.x < kWarp) refresh(id / kChunk, best);
  }
}

__global__ void __launch_bounds__(kThreads) choose_kernel(const SampleParams p, DeviceStatus* status) {
  MING_SHARED(Shared, m, [1]);
  const int64_t row = blockIdx.x;
  const Row r = row_of(p, row, status);
  float raw_max = -kInf, best = -kInf, sum = 0;
  for (int64_t c = threadIdx.x; c < r.chunks; c += kThreads) {
    raw_max = fmaxf(raw_max, r.raw_max[c]);
    best = fmaxf(best, r.top[c]);
  }
  raw_max = block_reduce(raw_max, Max{});
  best = block_reduce(best, Max{});
  for (int64_t c = threadIdx.x; c < r.chunks; c += kThreads)
    sum += r.raw_sum[c] * expf(r.raw_max[c] - raw_max);
  sum = block_reduce(sum, Sum{});
  if (!(sum < kInf && best > -kInf && best < kInf)) {  // also where the sum is NaN
    if (threadIdx.x == 0) p.ids[row] = -1;
    return;
  }
  const float log_sum = raw_max + logf(sum), temperature = p.temperature[row];
  const Scores s{r.scores(), r.top, p.vocab, r.chunks, best, temperature};
  const int64_t id = temperature > 0 ? draw(m[0], p, row, s, r.sums) : greedy(s);
  if (threadIdx.x == 0) {
    p.ids[row] = id;
    p.logprob[row] = r.x[id] - log_sum;
  }
  if (p.num_top) top_logprobs(p, row, r, log_sum);
}

__global__ void __launch_bounds__(kReduceThreads) ngram_bans_kernel(const NgramBansParams p) {
  const int64_t i = int64_t(blockIdx.x) * kReduceThreads + threadIdx.x, n = p.ngram_size;
  if (n <= 0 || i + n > p.length) return;
  const int64_t id = p.history[i + n - 1];
  if (id >= 0 && id < p.vocab && repeats(p.history, p.length, n, i)) p.banned[id] = 1;
}

}  // namespace

void sample(const SampleParams& p, Stream stream) {
  DeviceStatus* status = device_status();
  const int64_t chunks = ceil_div(p.vocab, kChunk);
  if (p.history_length > 0) MING_LAUNCH(mark_kernel, dim3(p.rows), kMarkThreads, 0, stream, p, status);
  MING_LAUNCH(reduce_kernel, dim3(ceil_div(chunks, kBlockChunks), p.rows), kReduceThreads, 0, stream, p,
              status);
  MING_LAUNCH(choose_kernel, dim3(p.rows), kThreads, 0, stream, p, status);
}

void ngram_bans(const NgramBansParams& p, Stream stream) {
  MING_LAUNCH(ngram_bans_kernel, dim3(ceil_div(p.length, kReduceThreads)), kReduceThreads, 0, stream, p);
}

}  // namespace ming::cuda
