// What the CUDA kernels of attention share: shapes made ready on the host, the sequence of a block, the
// places of keys in the cache, and the layout of split partials.
#pragma once

#include <limits>

#include "common/gpu.h"
#include "ops/attention/attention.h"

namespace ming::cuda::attention_detail {

using namespace ming::gpu;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kKeys = 64;  // keys of a shared-memory tile on tensor cores
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// Division of a 31-bit number by one the host knows; powers of two are shifts.
struct Divisor {
  uint32_t by;
  int32_t shift;  // -1: not a power of two

  static Divisor of(int64_t n) {
    Divisor d{uint32_t(n), -1};
    for (int s = 0; s < 31; ++s)
      if (int64_t(1) << s == n) d.shift = s;
    return d;
  }
  __device__ __forceinline__ uint32_t divide(uint32_t x) const { return shift >= 0 ? x >> shift : x / by; }
};

// Parameters and what follows from them. Rows of a sequence and KV head: row r is query r / group, head
// r % group of the group, so that one block serves all heads that share its keys.
struct Call {
  AttentionParams p;
  DeviceStatus* status;
  Divisor group, page;
  float scale_log2;    // of scores, for powers of two
  int32_t max_splits;  // room for split partials
  int32_t few;         // sequences with up to this many queries are split
};

// A block's sequence; without queries or keys where its description is wrong.
struct Sequence {
  int64_t base;  // first query row
  int32_t index, queries;
  int32_t keys;
  int64_t key_base;  // first row of k and v; not paged

  // Keys that row r sees.
  __device__ __forceinline__ int32_t visible(const Call& c, int32_t row) const {
    return c.p.page_table ? keys - queries + int32_t(c.group.divide(uint32_t(row))) + 1 : keys;
  }
};

// Reads and checks sequence b. The first thread reports.
__device__ __forceinline__ Sequence read_sequence(const Call& c, int32_t b) {
  const AttentionParams& p = c.p;
  const int32_t begin = p.cu_q[b], end = p.cu_q[b + 1];
  const bool inside = begin >= 0 && begin <= end && end <= p.rows;
  // The ends of the list are its first and last sequence's to check.
  const bool starts = b > 0 || begin == 0, ends = b + 1 < p.batch || end == p.rows;
  if (!(inside && starts && ends) && threadIdx.x == 0)
    report(c.status, Fault::cu_seqlens, starts ? end : begin);
  if (!inside) return {0, b, 0, 0, 0};
  Sequence s{begin, b, end - begin, end - begin, begin};
  if (!p.page_table) {
    if (!p.keys) return s;
    const int32_t first = p.keys[2 * b], last = p.keys[2 * b + 1];
    const bool right = first >= 0 && first <= last && last <= p.key_rows;
    if (!right || (p.bias && last - first > p.bias_keys)) {
      if (threadIdx.x == 0) report(c.status, Fault::key_range, right ? last - first : last);
      s.keys = 0;
      return s;
    }
    s.keys = last - first;
    s.key_base = first;
    return s;
  }
  s.keys = p.kv_lens[b];
  if (s.keys != 0 && (s.keys < s.queries || s.keys > p.max_pages * p.page_size)) {
    if (threadIdx.x == 0) report(c.status, Fault::kv_length, s.keys);
    s.keys = 0;
  }
  return s;
}

// A grid that knows the number of rows and sequences only: sequence b owns the slots from
// cu_q[b] * group / tile + b on, at least one per tile of `tile` rows. Returns the sequence that owns `slot`
// and its first one. Whole warps.
__device__ __forceinline__ int32_t find_sequence(const Call& c, int64_t slot, int tile, int64_t* first) {
  const auto start = [&](int32_t b) {
    const int64_t row = c.p.cu_q[b];
    return (row < 0 ? 0 : row > c.p.rows ? c.p.rows : row) * c.group.by / tile + b;
  };
  int32_t low = 0, high = c.p.batch;  // the last b of [low, high) that starts at or before the slot
  while (high - low > 1) {
    const int32_t step = (high - low + 31) / 32, probe = low + int32_t(threadIdx.x % 32) * step;
    const uint32_t before = __ballot_sync(kAllLanes, probe < high && start(probe) <= slot);
    const int32_t count = __popc(before);
    low += (count > 1 ? count - 1 : 0) * step;
    high = low + step < high ? low + step : high;
  }
  *first = start(low);
  return low;
}

// What a block of a tile kernel has to do; nothing: rows == 0.
struct Tile {
  Sequence s;
  int32_t row0, rows;  // queries x group
  int32_t begin, end;  // keys
};
// blockIdx.x counts slots from the last: of a causal sequence that is the heaviest tile, which comes first.
__device__ __forceinline__ Tile read_tile(const Call& c, int tile) {
  const int64_t slot = int64_t(gridDim.x) - 1 - blockIdx.x;
  int64_t first_slot;
  Tile t{read_sequence(c, find_sequence(c, slot, tile, &first_slot)), 0, 0, 0, 0};
  const int64_t row0 = (slot - first_slot) * tile, rows = int64_t(t.s.queries) * c.group.by - row0;
  if (row0 < 0 || rows <= 0 || (c.p.page_table && t.s.queries <= c.few)) return t;
  t.row0 = int32_t(row0);
  t.rows = int32_t(rows < tile ? rows : tile);
  t.end = t.s.keys == 0 ? 0 : t.s.visible(c, t.row0 + t.rows - 1);
  return t;
}

// Looks at all row offsets, also at those that no block finds: one block's work.
__device__ __forceinline__ void check_offsets(const Call& c) {
  for (int32_t b = int32_t(threadIdx.x); b < c.p.batch; b += kThreads)
    if (c.p.cu_q[b] > c.p.cu_q[b + 1]) report(c.status, Fault::cu_seqlens, c.p.cu_q[b + 1]);
}

// Where a key and its value lie, counted in values from those of the head's first; below 0: nowhere, to be
// read as zeros.
struct Place {
  int64_t k, v;
};

__device__ __forceinline__ Place find_key(const Call& c, const Sequence& s, int32_t key, int32_t end) {
  const AttentionParams& p = c.p;
  if (key >= end) return {-1, -1};
  if (!p.page_table) return {(s.key_base + key) * p.k_token_stride, (s.key_base + key) * p.v_token_stride};
  const uint32_t column = c.page.divide(uint32_t(key)), offset = uint32_t(key) - column * c.page.by;
  const int32_t page = p.page_table[s.index * p.page_table_stride + column];
  if (page < 0 || page >= p.pages) {
    report(c.status, Fault::page_table, page);
    return {-1, -1};
  }
  return {page * p.k_page_stride + offset * p.k_token_stride,
          page * p.v_page_stride + offset * p.v_token_stride};
}

template <typename T>
__device__ __forceinline__ const T* head_keys(const Call& c, int kv_head) {
  return static_cast<const T*>(c.p.k) + kv_head * c.p.k_head_stride;
}
template <typename T>
__device__ __forceinline__ const T* head_values(const Call& c, int kv_head) {
  return static_cast<const T*>(c.p.v) + kv_head * c.p.v_head_stride;
}

// Where a row of the queries begins, in values from the first.
__device__ __forceinline__ int64_t query_place(const Call& c, const Sequence& s, int kv_head, int32_t row) {
  const uint32_t query = c.group.divide(uint32_t(row)),
                 head = kv_head * c.group.by + row - query * c.group.by;
  return (s.base + query) * c.p.q_token_stride + head * c.p.q_head_stride;
}
template <typename T>
__device__ __forceinline__ const T* query_row(const Call& c, const Sequence& s, int kv_head, int32_t row) {
  return static_cast<const T*>(c.p.q) + query_place(c, s, kv_head, row);
}
template <typename T>
__device__ __forceinline__ T* out_row(const Call& c, const Sequence& s, int kv_head, int32_t row) {
  const uint32_t query = c.group.divide(uint32_t(row)),
                 head = kv_head * c.group.by + row - query * c.group.by;
  return static_cast<T*>(c.p.out) + (s.base + query) * c.p.out_token_stride + head * c.p.out_head_stride;
}

// Split partials: unnormalised outputs [rows, Hq, splits, D rounded up to 4], then maximum (of scores times
// scale_log2) and sum [rows, Hq, splits, 2]. Where the maximum is -inf there is no output.
struct Partials {
  float* out;
  Vec<float, 2>* stats;
  int64_t width;  // of out
};
__device__ __forceinline__ Partials partials(const Call& c) {
  const int64_t slots = attention_split_rows(c.p.rows, c.p.batch) * c.p.num_heads * c.max_splits;
  const int64_t width = (c.p.head_dim + 3) / 4 * 4;
  float* const out = static_cast<float*>(c.p.workspace);
  return {out, reinterpret_cast<Vec<float, 2>*>(out + slots * width), width};
}
// Slot of split 0 of a query and head; the other splits follow.
__device__ __forceinline__ int64_t partial_slot(const Call& c, const Sequence& s, int64_t query,
                                                int64_t head) {
  const bool dense = c.p.rows <= int64_t(kFewQueries) * c.p.batch;
  const int64_t row = (dense ? s.base : int64_t(kFewQueries) * s.index) + query;
  return (row * c.p.num_heads + head) * c.max_splits;
}

// What a block of a split kernel has to do; nothing: rows == 0.
struct Split {
  Sequence s;
  int32_t rows;        // queries x group
  int32_t number;      // of the split
  int32_t begin, end;  // keys
  bool only;           // the sequence has no other split: its output is final
};
// blockIdx.x is (sequence, split). Splits without keys do nothing, except that the first one of a sequence
// without any key writes zeros.
__device__ __forceinline__ Split read_split(const Call& c) {
  const int32_t b = int32_t(blockIdx.x) / c.max_splits, number = int32_t(blockIdx.x) % c.max_splits;
  Split w{read_sequence(c, b), 0, number, 0, 0, false};
  if (w.s.queries == 0 || w.s.queries > c.few) return w;
  const int64_t size = attention_split_keys(w.s.keys), begin = number * size;
  if (begin >= w.s.keys && number > 0) return w;
  w.rows = w.s.queries * int32_t(c.group.by);
  w.begin = int32_t(begin);
  w.end = begin + size < w.s.keys ? int32_t(begin + size) : w.s.keys;
  w.only = w.s.keys <= size;
  return w;
}

// Where a row's unnormalised output goes: normalised into the tensor, or as it is into the partials.
template <typename T>
struct SplitRow {
  T* out;
  float* partial;  // nullptr: into the tensor
  float norm;

  template <int Count>
  __device__ __forceinline__ void put(int column, const Vec<float, Count>& values) const {
    if (partial) return store(partial + column, values);
    Vec<T, Count> rounded;
#pragma unroll
    for (int i = 0; i < Count; ++i) rounded.at[i] = from_float<T>(values.at[i] * norm);
    store(out + column, rounded);
  }
};
// Whole warps; the first lane keeps maximum and sum. No key at all (sum 0) gives zeros.
template <typename T>
__device__ __forceinline__ SplitRow<T> split_row(const Call& c, const Split& w, int kv_head, int32_t row,
                                                 float max, float sum) {
  if (w.only) return {out_row<T>(c, w.s, kv_head, row), nullptr, sum == 0 ? 0.0f : 1.0f / sum};
  const uint32_t query = c.group.divide(uint32_t(row));
  const int64_t head = int64_t(kv_head) * c.group.by + row - query * c.group.by;
  const int64_t slot = partial_slot(c, w.s, query, head) + w.number;
  const Partials to = partials(c);
  if (threadIdx.x % 32 == 0) to.stats[slot] = {max, sum};
  return {nullptr, to.out + slot * to.width, 0.0f};
}

// Tensor cores take bfloat16 with these head_dims and rows that can be read 16 bytes at a time.
constexpr bool tensor_core_dim(int head_dim) {
  return head_dim == 64 || head_dim == 80 || head_dim == 128;
}
void tile_attention(const Call& c, Stream stream);
void split_attention(const Call& c, Stream stream);

// The same for any dtype, head_dim and strides.
void plain_tile_attention(const Call& c, Stream stream);
void plain_split_attention(const Call& c, Stream stream);

}  // namespace ming::cuda::attention_detail
