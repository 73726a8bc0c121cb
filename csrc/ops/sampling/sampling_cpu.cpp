#include "common/scratch.h"
#include "common/simd.h"
#include "common/thread_pool.h"
#include "ops/sampling/sampling.h"

namespace ming {
namespace MING_ISA {
namespace {

constexpr int64_t kChunk = 256;  // values whose maximum or sum is kept together
constexpr float kInf = std::numeric_limits<float>::infinity();

int64_t chunks_of(int64_t n) {
  return (n + kChunk - 1) / kChunk;
}

// Calls ban(id) for every id that would complete an n-gram of the history.
template <typename Ban>
void each_ngram_ban(const int64_t* history, int64_t length, int64_t n, Ban&& ban) {
  if (n <= 0 || n > length) return;
  const int64_t* last = history + length - (n - 1);
  for (int64_t i = 0; i + n <= length; ++i) {
    int64_t same = 0;
    while (same < n - 1 && history[i + same] == last[same]) ++same;
    if (same == n - 1) ban(history[i + n - 1]);
  }
}

// The maximum of each chunk; returns the largest. NaN may be lost: softmax_sum finds it.
float chunk_maxima(const float* v, int64_t n, float* maxima) {
  float best = -kInf;
  for (int64_t c = 0; c < n; c += kChunk) {
    const int64_t end = c + kChunk < n ? c + kChunk : n;
    vf m = vset(-kInf);
    int64_t i = c;
    for (; i + VF <= end; i += VF) m = vmax(m, vload(v + i));
    if (i < end) m = vmax(m, vload_n(v + i, int(end - i), -kInf));
    const float top = vmaxall(m);
    maxima[c / kChunk] = top;
    best = top > best ? top : best;
  }
  return best;
}

// sum of e^((v - max) / temperature), each chunk's sum (and each value, if wanted) stored on the way.
// NaN when v holds NaN or the maximum is not finite.
double softmax_sum(const float* v, int64_t n, float max, float temperature, float* weights, double* sums) {
  const vf shift = vset(max), divide = vset(temperature);
  double total = 0;
  for (int64_t c = 0; c < n; c += kChunk) {
    const int64_t end = c + kChunk < n ? c + kChunk : n;
    vf sum = vzero();
    for (int64_t i = c; i < end; i += VF) {
      const int w = end - i < VF ? int(end - i) : VF;
      const vf x = vload_n(v + i, w, -kInf);
      const vf e = vexp((x - shift) / divide);
      if (weights) vstore_n(weights + i, e, w);
      sum = sum + e;
    }
    const double s = vsum(sum);
    if (sums) sums[c / kChunk] = s;
    total += s;
  }
  return total;
}

// Unsigned keys in the order of the floats; -0 and +0 are one key.
uint32_t order_key(float f) {
  f += 0.0f;
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

struct Cut {
  uint32_t key;  // of the value at which the sum, from the largest value down, reaches the target
  double above;  // sum over strictly larger values
};

// Radix select by count (weights == nullptr) or by weight: three passes of a 2048-bin histogram.
Cut find_cut(const float* v, const float* weights, int64_t n, double target) {
  constexpr int kShift[3] = {21, 10, 0}, kBits[3] = {11, 11, 10};
  double* bins = scratch<double>(6, 2048);
  Cut cut{0, 0.0};
  for (int level = 0; level < 3; ++level) {
    const int shift = kShift[level], bits = kBits[level];
    const uint32_t mask = (1u << bits) - 1;
    std::memset(bins, 0, sizeof(double) * 2048);
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = order_key(v[i]);
      if (level == 0 || key >> (shift + bits) == cut.key)
        bins[key >> shift & mask] += weights ? weights[i] : 1.0;
    }
    int at = -1;
    double above = cut.above;
    for (int b = int(mask); b >= 0; --b) {
      if (bins[b] == 0) continue;
      if (at >= 0) above += bins[at];
      at = b;  // rounding may keep the sum below the target; then the last bin holds the cut
      if (above + bins[b] >= target) break;
    }
    cut.above = above;
    cut.key = cut.key << bits | uint32_t(at < 0 ? 0 : at);
  }
  return cut;
}

// Candidate tokens in id order.
struct Candidates {
  const float* value;
  const int32_t* id;  // nullptr: value[i] belongs to id i
  int64_t count;
};

// Values >= least, found through the chunk maxima.
Candidates gather(const float* v, int64_t n, const float* maxima, float least) {
  float* value = scratch<float>(2, n);
  int32_t* id = scratch<int32_t>(3, n);
  int64_t count = 0;
  for (int64_t c = 0; c < n; c += kChunk) {
    if (!(maxima[c / kChunk] >= least)) continue;
    const int64_t end = c + kChunk < n ? c + kChunk : n;
    for (int64_t i = c; i < end; ++i) {
      value[count] = v[i];
      id[count] = int32_t(i);
      count += v[i] >= least;
    }
  }
  return {value, id, count};
}

// A value that at least k of the n values reach: the k-th largest chunk maximum.
float lower_bound_of_kth(const float* maxima, int64_t chunks, int64_t k) {
  if (k > chunks) return -kInf;
  const uint32_t key = find_cut(maxima, nullptr, chunks, double(k)).key;
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Keeps, in place, candidates above the cut and the first `ties` at it.
void keep(Candidates* c, float* weights, uint32_t key, int64_t ties) {
  float* value = const_cast<float*>(c->value);
  int32_t* id = const_cast<int32_t*>(c->id);
  int64_t count = 0;
  for (int64_t i = 0; i < c->count; ++i) {
    const uint32_t k = order_key(value[i]);
    if (k < key || (k == key && ties-- <= 0)) continue;
    value[count] = value[i];
    id[count] = id[i];
    if (weights) weights[count] = weights[i];
    ++count;
  }
  c->count = count;
}

// The first candidate at which the running sum of weights exceeds uniform * total; where rounding or uniform
// = 1 leave that unreached, the last candidate of any weight.
int64_t draw(const Candidates& c, const float* weights, const double* sums, double total, float uniform) {
  const double target = double(uniform) * total;
  double sum = 0, before = 0;
  int64_t chunk = 0;
  for (int64_t i = 0; i < chunks_of(c.count) && sum <= target; ++i) {
    if (!(sums[i] > 0)) continue;
    chunk = i;
    before = sum;
    sum += sums[i];
  }
  const int64_t end = (chunk + 1) * kChunk < c.count ? (chunk + 1) * kChunk : c.count;
  int64_t last = 0;
  for (int64_t i = chunk * kChunk; i < end && before <= target; ++i) {
    if (!(weights[i] > 0)) continue;
    last = i;
    before += weights[i];
  }
  return c.id ? c.id[last] : last;
}

int64_t sample_filtered(const SampleParams& p, int64_t row, const float* y, float* maxima, float max) {
  const int64_t vocab = p.vocab, k = p.top_k[row];
  const float temperature = p.temperature[row], top_p = p.top_p[row];
  double* sums = scratch<double>(5, chunks_of(vocab));
  Candidates c{y, nullptr, vocab};
  double mass = 0;  // of the tokens that top_p chooses from, where not all of them are candidates
  if (k > 0 && k < vocab) {
    c = gather(y, vocab, maxima, lower_bound_of_kth(maxima, chunks_of(vocab), k));
    if (c.count > k) keep(&c, nullptr, find_cut(c.value, nullptr, c.count, double(k)).key, c.count);
  } else if (top_p < 1.0f) {
    // Tokens below (1 - top_p) * mass / V together weigh less than 1 - top_p, so none of them is needed.
    mass = softmax_sum(y, vocab, max, temperature, nullptr, nullptr);
    const double least = (1.0 - double(top_p)) * mass / double(vocab);
    c = gather(y, vocab, maxima, float(max + temperature * (std::log(least) - 1e-3)));
  }
  float* weights = scratch<float>(4, c.count);
  double total = softmax_sum(c.value, c.count, max, temperature, weights, sums);
  if (top_p < 1.0f) {
    const double target = double(top_p) * (mass > 0 ? mass : total);
    const Cut cut = find_cut(c.value, weights, c.count, target);
    double tie = 1.0;
    for (int64_t i = 0; i < c.count; ++i)
      if (order_key(c.value[i]) == cut.key) tie = weights[i];
    const double ties = std::ceil((target - cut.above) / tie);
    keep(&c, weights, cut.key, ties < 1 ? 1 : ties > double(c.count) ? c.count : int64_t(ties));
    total = softmax_sum(c.value, c.count, max, temperature, weights, sums);
  }
  return draw(c, weights, sums, total, p.uniform[row]);
}

// The num_top largest raw logits, ties by ascending id.
void top_logprobs(const SampleParams& p, int64_t row, const float* x, const float* maxima, float log_sum) {
  const int64_t n = p.num_top;
  const Candidates c = gather(x, p.vocab, maxima, lower_bound_of_kth(maxima, chunks_of(p.vocab), n));
  int64_t* ids = p.top_ids + row * n;
  float* best = p.top_logprob + row * n;
  int64_t count = 0;
  for (int64_t i = 0; i < c.count; ++i) {
    if (count == n && !(c.value[i] > best[n - 1])) continue;
    int64_t at = count < n ? count++ : n - 1;
    for (; at > 0 && c.value[i] > best[at - 1]; --at) {
      best[at] = best[at - 1];
      ids[at] = ids[at - 1];
    }
    best[at] = c.value[i];
    ids[at] = c.id[i];
  }
  for (int64_t i = 0; i < n; ++i) best[i] -= log_sum;
}

void sample_row(const SampleParams& p, int64_t row) {
  const float* x = p.logits + row * p.logits_stride;
  const int64_t vocab = p.vocab;
  float* maxima = scratch<float>(0, chunks_of(vocab));
  float max = chunk_maxima(x, vocab, maxima);
  const double sum = softmax_sum(x, vocab, max, 1.0f, nullptr, nullptr);
  p.ids[row] = -1;
  if (!(sum <= std::numeric_limits<double>::max())) return;
  const float log_sum = float(double(max) + std::log(sum));
  if (p.num_top) top_logprobs(p, row, x, maxima, log_sum);

  const float* y = x;
  const float penalty = p.repetition_penalty[row];
  const int64_t* bounds = p.history_bounds + 2 * row;
  const int64_t *history = p.history + bounds[0], length = bounds[1] - bounds[0];
  if (length > 0 && (penalty != 1.0f || p.ngram_size[row] > 0)) {
    float* changed = scratch<float>(1, vocab);
    std::memcpy(changed, x, size_t(vocab) * sizeof(float));
    auto known = [&](int64_t id) { return id >= 0 && id < vocab; };
    // From the raw logit, so that an id counts once however often it occurs.
    for (int64_t i = 0; i < length; ++i)
      if (const int64_t id = history[i]; known(id))
        changed[id] = x[id] < 0 ? x[id] * penalty : x[id] / penalty;
    each_ngram_ban(history, length, p.ngram_size[row], [&](int64_t id) {
      if (known(id)) changed[id] = -kInf;
    });
    y = changed;
    max = chunk_maxima(y, vocab, maxima);
    if (!(max > -kInf && max < kInf)) return;
  }
  int64_t id = 0;
  if (p.temperature[row] > 0) {
    id = sample_filtered(p, row, y, maxima, max);
  } else {
    while (maxima[id / kChunk] != max) id += kChunk;
    while (y[id] != max) ++id;
  }
  p.ids[row] = id;
  p.logprob[row] = x[id] - log_sum;
}

}  // namespace

void sample(const SampleParams& p) {
  parallel_for(p.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) sample_row(p, row);
  });
}

void ngram_bans(const NgramBansParams& p) {
  each_ngram_ban(p.history, p.length, p.ngram_size, [&](int64_t id) {
    if (id >= 0 && id < p.vocab) p.banned[id] = 1;
  });
}

}  // namespace MING_ISA
}  // namespace ming
