#include <cstring>

#include "common/scratch.h"
#include "common/thread_pool.h"
#include "ops/audio_bpe/audio_bpe.h"

namespace ming {
namespace MING_ISA {
namespace {

enum : int { kSumScratch, kChainScratch, kHeapScratch };  // scratch slots

// --- decode ---

constexpr int64_t kChunk = 4096;  // ids of one task

static inline int32_t length_of(const AudioBpeDecodeParams& p, int64_t id) {
  return id < p.vocab ? p.table_offsets[id + 1] - p.table_offsets[id] : 0;
}

// The first row that begins at `token` or behind it.
static inline int64_t row_at(const AudioBpeDecodeParams& p, int64_t token) {
  int64_t low = 0, high = p.rows + 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (p.cu_ids[middle] < token)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// --- encode ---

// The ids of a row as a chain; a place whose id went into its left neighbour is bypassed.
struct Chain {
  int32_t *id, *next, *before;  // next and before: -1 at the ends
  int32_t* pair;                // the pair a place forms with the next one, an index of pair_right, or -1
};

// Places of pairs, the lowest (rank, place) on top. A place may be in it several times; it is worth something
// only while the place still forms a pair of that rank.
struct Heap {
  uint64_t* at;
  int64_t size = 0;

  void push(uint64_t value) {
    int64_t i = size++;
    for (; i > 0 && at[(i - 1) / 2] > value; i = (i - 1) / 2) at[i] = at[(i - 1) / 2];
    at[i] = value;
  }
  uint64_t pop() {
    const uint64_t top = at[0], value = at[--size];
    int64_t i = 0;
    for (int64_t child = 1; child < size; child = 2 * i + 1) {
      if (child + 1 < size && at[child + 1] < at[child]) ++child;
      if (at[child] >= value) break;
      at[i] = at[child];
      i = child;
    }
    at[i] = value;
    return top;
  }
};

static inline int32_t find_pair(const AudioBpeEncodeParams& p, int32_t left, int32_t right) {
  int32_t low = p.pair_starts[left], high = p.pair_starts[left + 1];
  const int32_t end = high;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (p.pair_right[middle] < right)
      low = middle + 1;
    else
      high = middle;
  }
  return low < end && p.pair_right[low] == right ? low : -1;
}

// Writes the ids of `n` codes to `out`, at most n; returns how many. Every merge takes one place and one heap
// entry away and adds two entries at most: 2n entries are enough.
static int64_t encode_row(const AudioBpeEncodeParams& p, const int32_t* codes, int64_t n, int64_t* out) {
  int32_t* places = scratch<int32_t>(kChainScratch, 4 * n);
  const Chain chain{places, places + n, places + 2 * n, places + 3 * n};
  Heap heap{scratch<uint64_t>(kHeapScratch, 2 * n)};

  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i)
    if (p.symbols[codes[i]] >= 0) chain.id[count++] = p.symbols[codes[i]];
  const auto look = [&](int32_t i) {
    const int32_t pair = chain.next[i] < 0 ? -1 : find_pair(p, chain.id[i], chain.id[chain.next[i]]);
    chain.pair[i] = pair;
    if (pair >= 0) heap.push(uint64_t(p.pair_rank[pair]) << 32 | uint32_t(i));
  };
  for (int64_t i = 0; i < count; ++i) {
    chain.next[i] = i + 1 < count ? int32_t(i + 1) : -1;
    chain.before[i] = int32_t(i - 1);
  }
  for (int64_t i = 0; i < count; ++i) look(int32_t(i));

  while (heap.size > 0) {
    const uint64_t top = heap.pop();
    const int32_t i = int32_t(uint32_t(top)), pair = chain.pair[i];
    if (pair < 0 || uint32_t(p.pair_rank[pair]) != top >> 32) continue;
    const int32_t gone = chain.next[i];
    chain.id[i] = p.pair_merged[pair];
    chain.next[i] = chain.next[gone];
    chain.pair[gone] = -1;
    if (chain.next[i] >= 0) chain.before[chain.next[i]] = i;
    look(i);
    if (chain.before[i] >= 0) look(chain.before[i]);
  }
  int64_t written = 0;
  for (int32_t i = count > 0 ? 0 : -1; i >= 0; i = chain.next[i]) out[written++] = chain.id[i];
  return written;
}

}  // namespace

void audio_bpe_decode(const AudioBpeDecodeParams& p) {
  const int64_t chunks = (p.tokens + kChunk - 1) / kChunk;
  int32_t* sums = scratch<int32_t>(kSumScratch, chunks + 1);
  const auto end_of = [&](int64_t chunk) {
    return (chunk + 1) * kChunk < p.tokens ? (chunk + 1) * kChunk : p.tokens;
  };
  parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      int32_t sum = 0;
      for (int64_t n = chunk * kChunk; n < end_of(chunk); ++n) sum += length_of(p, p.ids[n]);
      sums[chunk] = sum;
    }
  });
  int32_t total = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int32_t sum = sums[chunk];
    sums[chunk] = total;
    total += sum;
  }
  parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      int32_t at = sums[chunk];
      int64_t row = row_at(p, chunk * kChunk);
      for (int64_t n = chunk * kChunk; n < end_of(chunk); ++n) {
        for (; row <= p.rows && p.cu_ids[row] == n; ++row) p.cu_codes[row] = at;
        const int32_t length = length_of(p, p.ids[n]);
        if (length == 0) continue;
        const int32_t* from = p.table_codes + p.table_offsets[p.ids[n]];
        for (int32_t i = 0; i < length; ++i) p.codes[at + i] = from[i];
        at += length;
      }
    }
  });
  for (int64_t row = row_at(p, p.tokens); row <= p.rows; ++row) p.cu_codes[row] = total;
}

void audio_bpe_encode(const AudioBpeEncodeParams& p) {
  int32_t* counts = p.cu_ids + 1;
  parallel_for(p.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int32_t first = p.cu_codes[row];
      counts[row] = int32_t(encode_row(p, p.codes + first, p.cu_codes[row + 1] - first, p.ids + first));
    }
  });
  p.cu_ids[0] = 0;
  for (int64_t row = 0; row < p.rows; ++row) {
    const int32_t count = counts[row];
    std::memmove(p.ids + p.cu_ids[row], p.ids + p.cu_codes[row], size_t(count) * sizeof(int64_t));
    p.cu_ids[row + 1] = p.cu_ids[row] + count;
  }
}

}  // namespace MING_ISA
}  // namespace ming
