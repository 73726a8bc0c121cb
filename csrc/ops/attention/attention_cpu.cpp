#include "common/scratch.h"
#include "common/thread_pool.h"
#include "ops/attention/attention.h"
#include "ops/attention/tile.h"

namespace ming {
namespace MING_ISA {
namespace {

constexpr int kFewRows = 16;
constexpr int64_t kMaxPartials = 16 << 20;  // floats of partial outputs that run_spans may hold

// Work of one tile of consecutive queries of one sequence against one KV head.
struct Tile {
  int32_t seq, q_begin, q_count;
  int32_t q_base, q_len, kv_base, kv_len;  // of the sequence: first row in q, queries, first row in k, keys
};

// Row r of a tile is query q_begin + r / G, head r % G of the group.
template <typename T>
struct Sequence {
  const AttentionParams& p;
  const Tile& t;
  int kv_head, group, rows;
  bool causal;

  Sequence(const AttentionParams& params, const Tile& tile, int head)
      : p(params),
        t(tile),
        kv_head(head),
        group(params.num_heads / params.num_kv_heads),
        rows(tile.q_count * group),
        causal(params.page_table != nullptr) {}

  // Number of keys the tile's last row sees.
  int64_t keys() const { return causal ? int64_t(t.kv_len) - t.q_len + t.q_begin + t.q_count : t.kv_len; }
  // Number of keys row r sees.
  int64_t visible(int r) const {
    return causal ? int64_t(t.kv_len) - t.q_len + t.q_begin + r / group + 1 : int64_t(t.kv_len);
  }
  // First row that sees `key`.
  int first_row(int64_t key) const {
    if (!causal) return 0;
    const int64_t i = key - (int64_t(t.kv_len) - t.q_len + t.q_begin);
    return i <= 0 ? 0 : i >= t.q_count ? rows : int(i) * group;
  }
  const T* query(int r) const {
    const int64_t token = int64_t(t.q_base) + t.q_begin + r / group;
    return static_cast<const T*>(p.q) + token * p.q_token_stride +
           (int64_t(kv_head) * group + r % group) * p.q_head_stride;
  }
  T* output(int r) const {
    const int64_t token = int64_t(t.q_base) + t.q_begin + r / group;
    return static_cast<T*>(p.out) + token * p.out_token_stride +
           (int64_t(kv_head) * group + r % group) * p.out_head_stride;
  }
  // Addresses of `count` rows of k or v from key `begin`; the block's further ones repeat the last.
  void key_rows(const T** at, int64_t begin, int count, const void* base, int64_t page_stride,
                int64_t head_stride, int64_t token_stride) const {
    const T* head = static_cast<const T*>(base) + kv_head * head_stride;
    if (!p.page_table) {
      for (int i = 0; i < kBlock; ++i)
        at[i] = head + (t.kv_base + begin + (i < count ? i : count - 1)) * token_stride;
      return;
    }
    const int32_t* table = p.page_table + t.seq * p.page_table_stride;
    for (int64_t i = 0; i < count;) {
      const int64_t offset = (begin + i) % p.page_size;
      const T* page = head + table[(begin + i) / p.page_size] * page_stride;
      for (int64_t o = offset; o < p.page_size && i < count; ++o) at[i++] = page + o * token_stride;
    }
    for (int i = count; i < kBlock; ++i) at[i] = at[count - 1];
  }
  void k_rows(const T** at, int64_t begin, int count) const {
    key_rows(at, begin, count, p.k, p.k_page_stride, p.k_head_stride, p.k_token_stride);
  }
  void v_rows(const T** at, int64_t begin, int count) const {
    key_rows(at, begin, count, p.v, p.v_page_stride, p.v_head_stride, p.v_token_stride);
  }
  // Scores [rows, kScoreStride] of `count` keys from `begin`, to be added to.
  void load_bias(float* scores, int64_t begin, int count) const {
    for (int r = 0; r < rows; ++r) {
      const int64_t token = int64_t(t.q_base) + t.q_begin + r / group;
      const float* bias = p.bias + (int64_t(kv_head) * group + r % group) * p.bias_head_stride +
                          token * p.bias_token_stride + begin;
      for (int i = 0; i < count; i += VF)
        vstore(scores + int64_t(r) * kScoreStride + i, vload_n(bias + i, count - i));
    }
  }
};

// Softmax state of a tile: running maximum, sum and unnormalised output of each row.
struct Partial {
  float* max;
  float* sum;
  float* out;  // [rows, Dp]
};

// Folds one span's partial into the running one.
void merge(const Partial& into, const Partial& from, int dp, int row_begin, int row_end) {
  for (int r = row_begin; r < row_end; ++r) {
    const float m = into.max[r] > from.max[r] ? into.max[r] : from.max[r];
    const float shift = m == -std::numeric_limits<float>::infinity() ? 0.0f : m;
    float weights[VF] = {into.max[r] - shift, from.max[r] - shift};
    vstore(weights, vexp2(vload(weights)));
    const vf a = vset(weights[0]), b = vset(weights[1]);
    into.max[r] = m;
    into.sum[r] = into.sum[r] * weights[0] + from.sum[r] * weights[1];
    float *x = into.out + int64_t(r) * dp, *y = from.out + int64_t(r) * dp;
    for (int i = 0; i < dp; i += VF) vstore(x + i, vfma(vload(x + i), a, vload(y + i) * b));
  }
}

template <typename T>
void finish(const Sequence<T>& seq, const Partial& total, int dp) {
  const int dim = seq.p.head_dim;
  for (int r = 0; r < seq.rows; ++r) {
    T* y = seq.output(r);
    if (seq.keys() == 0) {
      std::memset(y, 0, size_t(dim) * sizeof(T));
      continue;
    }
    const vf norm = vset(total.sum[r] == 0 ? 0.0f : 1.0f / total.sum[r]);
    const float* x = total.out + int64_t(r) * dp;
    for (int i = 0; i < dim; i += VF) vstore_n(y + i, vload(x + i) * norm, dim - i);
  }
}

template <typename T>
struct Worker {
  using K = Kernel<T>;
  const AttentionParams& p;
  const int dp, units;
  float *q, *s, *block;
  Partial total, part;

  static int64_t floats(const AttentionParams& p, int rows) {
    const int64_t dp = padded(p.head_dim);
    return rows * (K::units(p.head_dim) + int64_t(kScoreStride) + 2 * dp + 4) + K::units(kSpan) * dp +
           kBlock * dp + 64;
  }

  Worker(const AttentionParams& params, int max_rows)
      : p(params), dp(padded(params.head_dim)), units(K::units(params.head_dim)) {
    float* at = scratch<float>(1, floats(params, max_rows));
    auto take = [&](int64_t n) {
      float* r = at;
      at += n;
      return r;
    };
    block = take(int64_t(K::units(kSpan) + kBlock) * dp);
    s = take(int64_t(max_rows) * kScoreStride);
    total.out = take(int64_t(max_rows) * dp);
    part.out = take(int64_t(max_rows) * dp);
    q = take(int64_t(max_rows) * units);
    total.max = take(max_rows);
    total.sum = take(max_rows);
    part.max = take(max_rows);
    part.sum = take(max_rows);
  }

  void load_queries(const Sequence<T>& seq) {
    for (int r = 0; r < seq.rows; ++r) {
      const T* row = seq.query(r);
      K::pack_row(q + int64_t(r) * units, row, p.head_dim);
      // The next KV head's queries are likely this thread's next ones.
      for (int d = 0; d < p.head_dim; d += 64 / int(sizeof(T)))
        prefetch(row + seq.group * p.q_head_stride + d);
    }
  }

  // Softmax statistics and weighted values of the keys [begin, end) of one span; rows that see none are left
  // alone.
  void span(const Sequence<T>& seq, int64_t begin, int64_t end, const Partial& to) {
    const T *rows[kBlock], *next[kBlock];
    auto size = [&](int64_t key, int64_t until) { return int(until - key < kBlock ? until - key : kBlock); };
    seq.k_rows(next, begin, size(begin, end));
    for (int64_t key = begin; key < end; key += kBlock) {
      const int n = size(key, end), first = seq.first_row(key);
      std::memcpy(rows, next, sizeof(rows));
      key + kBlock < end ? seq.k_rows(next, key + kBlock, size(key + kBlock, end))
                         : seq.v_rows(next, begin, size(begin, end));
      K::pack_k(block, rows, n, p.head_dim, next);
      if (p.bias) seq.load_bias(s + (key - begin), key, n);
      K::gemm(seq.rows - first, (n + VF - 1) / VF * VF, units, q + int64_t(first) * units, units, block,
              kBlock, s + int64_t(first) * kScoreStride + (key - begin), kScoreStride, p.bias != nullptr);
    }
    const float scale = p.scale * 1.44269504088896341f;
    for (int r = seq.first_row(begin); r < seq.rows; ++r) {
      const int64_t seen = seq.visible(r) - begin, len = end - begin;
      K::softmax(s + int64_t(r) * kScoreStride, int(seen < len ? seen : len), int(len), scale, to.max + r,
                 to.sum + r);
    }
    // Many rows share all of the span's values, so that their sums stay in registers; few rows take a block
    // at a time, which stays in the first-level cache.
    const int64_t step = seq.rows > kFewRows ? kSpan : kBlock;
    for (int64_t from = begin; from < end; from += step) {
      const int64_t to_key = end - from < step ? end : from + step;
      int depth = 0;
      for (int64_t key = from; key < to_key; key += kBlock) {
        std::memcpy(rows, next, sizeof(rows));
        if (key + kBlock < end)
          seq.v_rows(next, key + kBlock, size(key + kBlock, end));
        else if (end < seq.keys())
          seq.k_rows(next, end, size(end, seq.keys()));
        else if (seq.kv_head + 1 < p.num_kv_heads)
          Sequence<T>(p, seq.t, seq.kv_head + 1).k_rows(next, 0, size(0, seq.keys()));
        depth += K::pack_v(block + int64_t(depth) * dp, rows, size(key, end), p.head_dim, dp, next);
      }
      const int first = seq.first_row(from);
      K::gemm(seq.rows - first, dp, depth, s + int64_t(first) * kScoreStride + K::units(int(from - begin)),
              kScoreStride, block, dp, to.out + int64_t(first) * dp, dp, from != begin);
    }
  }

  void run(const Sequence<T>& seq) {
    load_queries(seq);
    const int64_t keys = seq.keys();
    for (int64_t begin = 0; begin < keys; begin += kSpan) {
      const int64_t end = keys - begin < kSpan ? keys : begin + kSpan;
      span(seq, begin, end, begin ? part : total);
      if (begin) merge(total, part, dp, seq.first_row(begin), seq.rows);
    }
    finish(seq, total, dp);
  }
};

// Each tile as a whole: packed keys are shared by all its rows. The tiles of a long sequence follow one
// another within a head, because they read the same keys; short sequences take head after head, because those
// are neighbours in memory.
template <typename T>
void run_tiles(const AttentionParams& p, const Tile* tiles, int64_t count, int max_rows) {
  const int64_t heads = p.num_kv_heads;
  const bool by_head = count > p.batch;
  const int64_t grain = !by_head && count >= 8 * num_threads() ? heads : 1;
  parallel_for(count * heads, grain, [&](int64_t begin, int64_t end) {
    Worker<T> worker(p, max_rows);
    for (int64_t i = begin; i < end; ++i)
      worker.run(
          Sequence<T>(p, tiles[by_head ? i % count : i / heads], int(by_head ? i / count : i % heads)));
  });
}

// Spans of few long sequences spread over the threads, then merged in the order run() merges them in.
template <typename T>
void run_spans(const AttentionParams& p, const Tile* tiles, int64_t count, int max_rows, int64_t spans) {
  const int dp = padded(p.head_dim);
  const int64_t heads = p.num_kv_heads, size = int64_t(max_rows) * (dp + 2);
  float* partials = scratch<float>(2, count * heads * spans * size);
  auto partial = [&](int64_t i) {
    float* at = partials + i * size;
    return Partial{at + int64_t(max_rows) * dp, at + int64_t(max_rows) * (dp + 1), at};
  };
  parallel_for(count * heads * spans, 1, [&](int64_t begin, int64_t end) {
    Worker<T> worker(p, max_rows);
    for (int64_t i = begin; i < end; ++i) {
      const Sequence<T> seq(p, tiles[i / spans / heads], int(i / spans % heads));
      const int64_t first = i % spans * kSpan, keys = seq.keys();
      if (first >= keys) continue;
      worker.load_queries(seq);
      worker.span(seq, first, keys - first < kSpan ? keys : first + kSpan, partial(i));
    }
  });
  parallel_for(count * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Sequence<T> seq(p, tiles[i / heads], int(i % heads));
      const Partial total = partial(i * spans);
      for (int64_t s = 1; s * kSpan < seq.keys(); ++s)
        merge(total, partial(i * spans + s), dp, seq.first_row(s * kSpan), seq.rows);
      finish(seq, total, dp);
    }
  });
}

template <typename T>
void attention_typed(const AttentionParams& p) {
  const auto keys_of = [&](int b, int32_t q_len) {
    return p.page_table ? p.kv_lens[b] : p.keys ? p.keys[2 * b + 1] - p.keys[2 * b] : q_len;
  };
  const int group = p.num_heads / p.num_kv_heads;
  const int tile_queries = group >= kTileRows ? 1 : kTileRows / group;
  int64_t count = 0, longest = 0;
  int tallest = 0;
  for (int b = 0; b < p.batch; ++b) {
    const int32_t q_len = p.cu_q[b + 1] - p.cu_q[b], kv_len = keys_of(b, q_len);
    if (q_len == 0) continue;
    count += (q_len + tile_queries - 1) / tile_queries;
    if (kv_len > longest) longest = kv_len;
    if (q_len > tallest) tallest = q_len < tile_queries ? q_len : tile_queries;
  }
  Tile* tiles = scratch<Tile>(0, count);
  int64_t at = 0;
  for (int b = 0; b < p.batch; ++b) {
    const int32_t q_len = p.cu_q[b + 1] - p.cu_q[b], kv_len = keys_of(b, q_len);
    const int32_t kv_base = p.keys ? p.keys[2 * b] : p.cu_q[b];
    // Last tile first: with a causal mask it is the heaviest.
    for (int32_t i = (q_len + tile_queries - 1) / tile_queries - 1; i >= 0; --i) {
      const int32_t begin = i * tile_queries, n = q_len - begin < tile_queries ? q_len - begin : tile_queries;
      tiles[at++] = {b, begin, n, p.cu_q[b], q_len, kv_base, kv_len};
    }
  }
  const int64_t items = count * p.num_kv_heads, spans = (longest + kSpan - 1) / kSpan;
  const int max_rows = tallest * group;
  const bool few = items < 4 * int64_t(num_threads()) && num_threads() > 1;
  if (few && spans > 1 && items * spans * max_rows * padded(p.head_dim) <= kMaxPartials)
    run_spans<T>(p, tiles, count, max_rows, spans);
  else
    run_tiles<T>(p, tiles, count, max_rows);
}

}  // namespace

void attention(const AttentionParams& p) {
  p.dtype == DType::f32 ? attention_typed<float>(p) : attention_typed<bf16>(p);
}

}  // namespace MING_ISA
}  // namespace ming
