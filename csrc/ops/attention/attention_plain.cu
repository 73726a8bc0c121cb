// Attention in fp32 FMA for any dtype, head_dim and strides: a block takes 32 rows and walks over keys, 32 at
// a time, one per lane; the head_dim goes through shared memory 64 columns at a time. Row r belongs to warp
// r % 4. More than 256 columns of output are several blocks that compute the same scores.
#include "ops/attention/device.cuh"

namespace ming::cuda::attention_detail {
namespace {

constexpr int kRows = 32;
constexpr int kWarpRows = kRows / kWarps;
constexpr int kLaneKeys = 32;
constexpr int kColumns = 64;
constexpr int kPitch = kColumns + 4;
constexpr int kMostChunks = 4;  // of kColumns that a block puts out
constexpr int kChunkFloats = 32 * kPitch;

template <typename T>
__device__ __forceinline__ float read(const T* row, int column, int dim) {
  return column < dim ? to_float(row[column]) : 0.0f;
}

// Where the biases of a row begin.
__device__ __forceinline__ int64_t bias_place(const Call& c, const Sequence& s, int kv_head, int32_t row) {
  const uint32_t query = c.group.divide(uint32_t(row)),
                 head = kv_head * c.group.by + row - query * c.group.by;
  return head * c.p.bias_head_stride + (s.base + query) * c.p.bias_token_stride;
}

// The state of a warp's rows; a lane has its own part of each sum, and output columns 2 lane, 2 lane + 1 of
// each chunk.
template <int Chunks>
struct State {
  float max[kWarpRows], sum[kWarpRows], out[kWarpRows][Chunks][2];
};

template <typename T, int Chunks>
__device__ __forceinline__ void attend(State<Chunks>& state, const Call& c, const Tile& t, int kv_head,
                                       int chunk0) {
  MING_DYNAMIC_SHARED(float, q_shared);  // [min(all chunks, kMostChunks)][kRows][kPitch]
  MING_SHARED(float, kv_shared, [kLaneKeys][kPitch]);
  MING_SHARED(float, weights, [kRows][kLaneKeys]);
  MING_SHARED(Place, places, [kLaneKeys]);
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32, dim = c.p.head_dim;
  const int all_chunks = (dim + kColumns - 1) / kColumns;
  const int32_t mine = (t.rows - warp + kWarps - 1) / kWarps;  // rows of this warp
  const bool keep_q = all_chunks <= kMostChunks;
  const T *const keys = head_keys<T>(c, kv_head), *const values = head_values<T>(c, kv_head);

  const auto load_q = [&](int chunk) {
    for (int i = thread; i < kRows * kColumns; i += kThreads) {
      const int row = i / kColumns, column = i % kColumns;
      q_shared[(keep_q ? chunk : 0) * kChunkFloats + row * kPitch + column] =
          row < t.rows ? read(query_row<T>(c, t.s, kv_head, t.row0 + row), chunk * kColumns + column, dim)
                       : 0;
    }
  };
  const auto load_kv = [&](const T* from, int64_t Place::* member, int chunk) {
    for (int i = thread; i < kLaneKeys * kColumns; i += kThreads) {
      const int key = i / kColumns, column = i % kColumns;
      const int64_t at = places[key].*member;
      kv_shared[key][column] = at < 0 ? 0 : read(from + at, chunk * kColumns + column, dim);
    }
  };

#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    state.max[r] = kMinusInf;
    state.sum[r] = 0;
#pragma unroll
    for (int n = 0; n < Chunks; ++n) state.out[r][n][0] = state.out[r][n][1] = 0;
  }
  __syncthreads();  // the memory may still be in use
  if (keep_q)
    for (int chunk = 0; chunk < all_chunks; ++chunk) load_q(chunk);
  for (int32_t key0 = t.begin; key0 < t.end; key0 += kLaneKeys) {
    if (thread < kLaneKeys) places[thread] = find_key(c, t.s, key0 + thread, t.end);
    float scores[kWarpRows] = {};
    for (int chunk = 0; chunk < all_chunks; ++chunk) {
      __syncthreads();
      if (!keep_q) load_q(chunk);
      load_kv(keys, &Place::k, chunk);
      __syncthreads();
      const float* q = q_shared + (keep_q ? chunk : 0) * kChunkFloats + warp * kPitch;
#pragma unroll 4
      for (int d = 0; d < kColumns; d += 4) {
        const auto k = load<4>(&kv_shared[lane][d]);
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
          if (r >= mine) continue;
          const auto x = load<4>(q + kWarps * r * kPitch + d);
#pragma unroll
          for (int j = 0; j < 4; ++j) scores[r] = fmaf(x.at[j], k.at[j], scores[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      if (r >= mine) continue;
      const int32_t row = warp + kWarps * r, key = key0 + lane;
      const bool seen = key < t.s.visible(c, t.row0 + row) && key < t.end;
      if (seen && c.p.bias) scores[r] += c.p.bias[bias_place(c, t.s, kv_head, t.row0 + row) + key];
      const float score = seen ? scores[r] * c.scale_log2 : kMinusInf;
      const float top = fmaxf(state.max[r], warp_max(score)), shift = top == kMinusInf ? 0.0f : top;
      const float shrink = exp2f(state.max[r] - shift), weight = exp2f(score - shift);
      state.max[r] = top;
      state.sum[r] = fmaf(state.sum[r], shrink, weight);
      weights[row][lane] = weight;
#pragma unroll
      for (int n = 0; n < Chunks; ++n) {
        state.out[r][n][0] *= shrink;
        state.out[r][n][1] *= shrink;
      }
    }
#pragma unroll
    for (int n = 0; n < Chunks; ++n) {
      __syncthreads();
      load_kv(values, &Place::v, chunk0 + n);
      __syncthreads();
#pragma unroll 2
      for (int key = 0; key < kLaneKeys; key += 4) {
        Vec<float, 2> v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) v[j] = load<2>(&kv_shared[key + j][2 * lane]);
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
          if (r >= mine) continue;
          const auto w = load<4>(&weights[warp + kWarps * r][key]);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            state.out[r][n][0] = fmaf(w.at[j], v[j].at[0], state.out[r][n][0]);
            state.out[r][n][1] = fmaf(w.at[j], v[j].at[1], state.out[r][n][1]);
          }
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) state.sum[r] = warp_sum(state.sum[r]);
}

// Columns of one row of the state, in order; `put(column, value)`.
template <int Chunks, typename Put>
__device__ __forceinline__ void put_columns(const float (&out)[Chunks][2], int chunk0, int dim, Put&& put) {
#pragma unroll
  for (int n = 0; n < Chunks; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int column = (chunk0 + n) * kColumns + int(threadIdx.x) % 32 * 2 + j;
      if (column < dim) put(column, out[n][j]);
    }
}

// blockIdx.y is (block of columns, KV head).
template <typename T, int Chunks>
__global__ void __launch_bounds__(kThreads) tile_kernel(const Call c) {
  const int kv_head = int(blockIdx.y) % c.p.num_kv_heads,
            chunk0 = int(blockIdx.y) / c.p.num_kv_heads * Chunks;
  if (!c.p.page_table && blockIdx.x == 0 && blockIdx.y == 0) check_offsets(c);
  const Tile t = read_tile(c, kRows);
  if (t.rows == 0) return;
  State<Chunks> state;
  attend<T>(state, c, t, kv_head, chunk0);
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const int32_t row = int32_t(threadIdx.x) / 32 + kWarps * r;
    if (row >= t.rows) continue;
    const float norm = state.sum[r] == 0 ? 0.0f : 1.0f / state.sum[r];
    T* const to = out_row<T>(c, t.s, kv_head, t.row0 + row);
    put_columns(state.out[r], chunk0, c.p.head_dim,
                [&](int column, float x) { to[column] = from_float<T>(x * norm); });
  }
}

template <typename T, int Chunks>
__global__ void __launch_bounds__(kThreads) split_kernel(const Call c) {
  const int kv_head = int(blockIdx.y) % c.p.num_kv_heads,
            chunk0 = int(blockIdx.y) / c.p.num_kv_heads * Chunks;
  const Split w = read_split(c);
  for (int32_t row0 = 0; row0 < w.rows; row0 += kRows) {
    const int32_t rows = w.rows - row0 < kRows ? w.rows - row0 : kRows;
    const int32_t seen = w.s.visible(c, row0 + rows - 1);
    State<Chunks> state;
    attend<T>(state, c, Tile{w.s, row0, rows, w.begin, seen < w.end ? seen : w.end}, kv_head, chunk0);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const int32_t row = int32_t(threadIdx.x) / 32 + kWarps * r;
      if (row >= rows) continue;
      const SplitRow<T> to = split_row<T>(c, w, kv_head, row0 + row, state.max[r], state.sum[r]);
      put_columns(state.out[r], chunk0, c.p.head_dim,
                  [&](int column, float x) { to.put(column, Vec<float, 1>{x}); });
    }
  }
}

// Calls fn(chunks per block as a constant, grid.y, bytes of the queries).
template <typename F>
void with_chunks(const AttentionParams& p, F&& fn) {
  const int64_t chunks = ceil_div(p.head_dim, kColumns);
  const uint32_t y = uint32_t(ceil_div(chunks, kMostChunks) * p.num_kv_heads);
  const size_t bytes = size_t(chunks < kMostChunks ? chunks : kMostChunks) * kChunkFloats * sizeof(float);
  if (chunks == 1)
    fn(std::integral_constant<int, 1>{}, y, bytes);
  else if (chunks == 2)
    fn(std::integral_constant<int, 2>{}, y, bytes);
  else
    fn(std::integral_constant<int, kMostChunks>{}, y, bytes);
}

}  // namespace

void plain_tile_attention(const Call& c, Stream stream) {
  with_dtype(c.p.dtype, [&](auto t) {
    using T = decltype(t);
    with_chunks(c.p, [&](auto chunks, uint32_t y, size_t bytes) {
      constexpr int kChunks = decltype(chunks)::value;
      const dim3 grid(uint32_t(c.p.rows * c.group.by / kRows + c.p.batch), y);
      MING_LAUNCH((tile_kernel<T, kChunks>), grid, kThreads, bytes, stream, c);
    });
  });
}

void plain_split_attention(const Call& c, Stream stream) {
  with_dtype(c.p.dtype, [&](auto t) {
    using T = decltype(t);
    with_chunks(c.p, [&](auto chunks, uint32_t y, size_t bytes) {
      constexpr int kChunks = decltype(chunks)::value;
      const dim3 grid(uint32_t(c.p.batch * c.max_splits), y);
      MING_LAUNCH((split_kernel<T, kChunks>), grid, kThreads, bytes, stream, c);
    });
  });
}

}  // namespace ming::cuda::attention_detail
