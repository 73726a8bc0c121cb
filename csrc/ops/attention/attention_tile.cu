// Attention of many queries on tensor cores: a block takes 64 or 128 rows of one sequence and KV head and
// walks over its keys, 64 at a time, with a running softmax in registers.
#include "ops/attention/device.cuh"
#include "ops/attention/fragments.cuh"

namespace ming::cuda::attention_detail {
namespace {

template <int D, int M>
struct TileShape {
  static constexpr int kWarpRows = 16 * M;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kPitch = D + 8;  // an odd number of 16-byte units: ldmatrix meets no bank twice
  static constexpr int kBytes = (kRows + 2 * kKeys) * kPitch * int(sizeof(bf16));
};

// Starts the copy of a tile's keys or values; those that lie nowhere become zeros. Segments: `first` is the
// tile's first row and `count` how many follow; paged: `places` has them all.
template <int D, bool Paged>
__device__ __forceinline__ void fetch(bf16* to, const Rows<bf16>& rows, const Place* places, int64_t first,
                                      int32_t count) {
  constexpr int kChunks = D / 8;
#pragma unroll
  for (int i = 0; i < kKeys * kChunks / kThreads; ++i) {
    const int item = int(threadIdx.x) + i * kThreads, key = item / kChunks, column = item % kChunks * 8;
    const bf16* from = rows.head;
    bool valid;
    if constexpr (Paged) {
      const Place place = places[key];
      valid = place.page >= 0;
      from = rows.at(place);
    } else {
      valid = key < count;
      if (valid) from += (first + key) * rows.token_stride;
    }
    cp_async16(to + key * (D + 8) + column, from + column, valid);
  }
}

template <int D, int M, bool Paged>
__global__ void __launch_bounds__(kThreads, M == 2 ? 2 : 3) tile_kernel(const Call c) {
  using Shape = TileShape<D, M>;
  constexpr int kPitch = Shape::kPitch, kChunks = D / 8;
  MING_DYNAMIC_SHARED(bf16, shared);
  MING_SHARED(Place, places, [2][Paged ? kKeys : 1]);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, kv_head = int(blockIdx.y);
  if (!Paged && blockIdx.x == 0 && kv_head == 0) check_offsets(c);

  // Of a causal sequence the last tile is the heaviest: it comes first.
  const int64_t slot = int64_t(gridDim.x) - 1 - blockIdx.x;
  int64_t first_slot;
  const Sequence s = read_sequence(c, find_sequence(c, slot, Shape::kRows, &first_slot));
  const int64_t first_row = (slot - first_slot) * Shape::kRows, all_rows = int64_t(s.queries) * c.group.by;
  if (first_row < 0 || first_row >= all_rows || (Paged && s.queries <= c.few)) return;
  const int32_t row0 = int32_t(first_row);
  const int32_t rows = int32_t(all_rows - first_row < Shape::kRows ? all_rows - first_row : Shape::kRows);
  if (s.keys == 0) {
    for (int i = int(threadIdx.x); i < rows * kChunks; i += kThreads)
      store(out_row<bf16>(c, s, kv_head, row0 + i / kChunks) + i % kChunks * 8, Vec<bf16, 8>{});
    return;
  }
  const int32_t end = s.visible(c, row0 + rows - 1), tiles = (end + kKeys - 1) / kKeys;

  bf16* const q_shared = shared;
  bf16* const k_shared = q_shared + Shape::kRows * kPitch;
  bf16* const v_shared = k_shared + kKeys * kPitch;
  const Rows<bf16> k_rows = key_rows<bf16>(c.p, kv_head), v_rows = value_rows<bf16>(c.p, kv_head);
  const auto place_keys = [&](int tile) {
    if constexpr (Paged) {
      if (threadIdx.x < kKeys)
        places[tile & 1][threadIdx.x] = find_key(c, s, tile * kKeys + int32_t(threadIdx.x), end);
    }
  };
  const auto fetch_tile = [&](bf16* to, const Rows<bf16>& from, int tile) {
    fetch<D, Paged>(to, from, places[Paged ? tile & 1 : 0], s.base + tile * kKeys, end - tile * kKeys);
    cp_async_commit();
  };

  place_keys(0);
  for (int i = int(threadIdx.x); i < Shape::kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, column = i % kChunks * 8;
    const bool valid = row < rows;
    const bf16* from = query_row<bf16>(c, s, kv_head, row0 + (valid ? row : 0));
    cp_async16(q_shared + row * kPitch + column, from + column, valid);
  }
  if (Paged) __syncthreads();
  fetch_tile(k_shared, k_rows, 0);
  fetch_tile(v_shared, v_rows, 0);

  // Keys seen by this thread's rows (each at least the first one), and the least and most in its warp.
  const int32_t warp_row = warp * Shape::kWarpRows;
  int32_t limit[M][2];
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int32_t row = warp_row + 16 * m + 8 * h + lane / 4;
      limit[m][h] = s.visible(c, row0 + (row < rows ? row : rows - 1));
    }
  const int32_t last_row = warp_row + Shape::kWarpRows - 1;
  const int32_t most = warp_row < rows ? s.visible(c, row0 + (last_row < rows ? last_row : rows - 1)) : 0;
  const int32_t least = warp_row < rows ? s.visible(c, row0 + warp_row) : 0;

  Softmax<D, M> state;
  state.clear();
  bf16* const q_warp = q_shared + warp_row * kPitch;
  const bf16* const q_lane = q_warp + row_first(kPitch);
  const auto load_q = [&](uint32_t (&a)[M][4], int d) {
#pragma unroll
    for (int m = 0; m < M; ++m) ldmatrix_x4(a[m], q_lane + 16 * m * kPitch + d);
  };
  for (int tile = 0; tile < tiles; ++tile) {
    // The keys are here (and the queries); nobody uses the values before them any more.
    if (tile == 0)
      cp_async_wait<1>();
    else
      cp_async_wait<0>();
    __syncthreads();
    if (tile > 0) fetch_tile(v_shared, v_rows, tile);
    place_keys(tile + 1);
    const int32_t key0 = tile * kKeys;
    const bool busy = key0 < most;
    float scores[M][kKeys / 8][4];
    if (busy) multiply_keys<D, M, kKeys, kPitch>(scores, load_q, k_shared);
    __syncthreads();  // nobody uses the keys any more
    if (tile + 1 < tiles)
      fetch_tile(k_shared, k_rows, tile + 1);
    else
      cp_async_commit();
    if (busy) {
      if (key0 + kKeys > least) mask_keys<M, kKeys>(scores, key0, limit);
      state.template add<kKeys>(scores, c.scale_log2);
    }
    cp_async_wait<1>();
    __syncthreads();  // the values are here
    if (busy) state.template add_values<kKeys, kPitch>(scores, v_shared);
  }

  // Through the queries' memory, which is this warp's alone by now, into whole rows.
  state.finish_sums();
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float norm = 1.0f / state.sum[m][h];
      bf16* row = q_warp + (16 * m + 8 * h + lane / 4) * kPitch + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        *reinterpret_cast<uint32_t*>(row + 8 * n) =
            pack_bf16(state.out[m][n][2 * h] * norm, state.out[m][n][2 * h + 1] * norm);
    }
  __syncwarp();
  const int32_t warp_rows = rows - warp_row < Shape::kWarpRows ? rows - warp_row : Shape::kWarpRows;
  for (int i = lane; i < warp_rows * kChunks; i += 32) {
    const int row = i / kChunks, column = i % kChunks * 8;
    store(out_row<bf16>(c, s, kv_head, row0 + warp_row + row) + column,
          load<8>(q_warp + row * kPitch + column));
  }
}

template <int D, int M>
void launch_tiles(const Call& c, Stream stream) {
  using Shape = TileShape<D, M>;
  const dim3 grid(uint32_t(c.p.rows * c.group.by / Shape::kRows + c.p.batch), uint32_t(c.p.num_kv_heads));
  if (c.p.page_table)
    MING_LAUNCH((tile_kernel<D, M, true>), grid, kThreads, Shape::kBytes, stream, c);
  else
    MING_LAUNCH((tile_kernel<D, M, false>), grid, kThreads, Shape::kBytes, stream, c);
}

template <int D>
void launch_dim(const Call& c, Stream stream) {
  // Tall tiles halve the traffic; short ones suit short segments and fill the device. Rows get the same bits.
  const int64_t rows = c.p.rows * c.group.by;
  const bool tall = rows >= 96 * int64_t(c.p.batch) && rows / 128 * c.p.num_kv_heads >= sm_count();
  tall ? launch_tiles<D, 2>(c, stream) : launch_tiles<D, 1>(c, stream);
}

}  // namespace

void tile_attention(const Call& c, Stream stream) {
  with_tensor_core_dim(c.p.head_dim, [&](auto dim) { launch_dim<decltype(dim)::value>(c, stream); });
}

}  // namespace ming::cuda::attention_detail
