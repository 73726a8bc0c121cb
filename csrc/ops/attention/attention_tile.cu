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
  static constexpr int kBytes = (kRows + 2 * kKeys) * kPitch<D> * int(sizeof(bf16));
};

template <int D, int M, bool Paged>
__global__ void __launch_bounds__(kThreads, M == 2     ? 2
                                            : D == 128 ? 3
                                                       : 4) tile_kernel(const Call c) {
  using Shape = TileShape<D, M>;
  constexpr int kChunks = D / 8;
  MING_DYNAMIC_SHARED(bf16, shared);
  MING_SHARED(Place, places, [2][Paged ? kKeys : 1]);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, kv_head = int(blockIdx.y);
  if (!Paged && blockIdx.x == 0 && kv_head == 0) check_offsets(c);

  // What is seldom needed waits in shared memory: registers are scarce.
  MING_SHARED(Tile, work, [1]);
  MING_SHARED(const bf16*, heads, [2]);  // first key and value; of a segment, its own
  const Tile& t = work[0];
  const Tile found = read_tile(c, Shape::kRows);
  if (found.rows == 0) return;
  if (found.end == 0) {
    for (int i = int(threadIdx.x); i < found.rows * kChunks; i += kThreads)
      store(out_row<bf16>(c, found.s, kv_head, found.row0 + i / kChunks) + i % kChunks * 8, Vec<bf16, 8>{});
    return;
  }
  if (threadIdx.x == 0) {
    work[0] = found;
    heads[0] = head_keys<bf16>(c, kv_head) + (Paged ? 0 : found.s.key_base * c.p.k_token_stride);
    heads[1] = head_values<bf16>(c, kv_head) + (Paged ? 0 : found.s.key_base * c.p.v_token_stride);
  }
  __syncthreads();

  bf16* const q_shared = shared;
  bf16* const k_shared = q_shared + Shape::kRows * kPitch<D>;
  bf16* const v_shared = k_shared + kKeys * kPitch<D>;
  const auto place_keys = [&](int tile) {
    if constexpr (Paged) {
      if (threadIdx.x < kKeys)
        places[tile & 1][threadIdx.x] = find_key(c, t.s, tile * kKeys + int32_t(threadIdx.x), t.end);
    }
  };
  const auto fetch = [&](bf16* to, const bf16* from, int64_t Place::* place, int64_t stride, int tile) {
    copy_rows<D, kThreads, kKeys>(to, from, [&](int key) -> int64_t {
      if constexpr (Paged) return places[tile & 1][key].*place;
      const int32_t row = tile * kKeys + key;
      return row < t.end ? row * stride : -1;
    });
    cp_async_commit();
  };
  const auto fetch_keys = [&](int tile) { fetch(k_shared, heads[0], &Place::k, c.p.k_token_stride, tile); };
  const auto fetch_values = [&](int tile) { fetch(v_shared, heads[1], &Place::v, c.p.v_token_stride, tile); };

  place_keys(0);
  copy_rows<D, kThreads, Shape::kRows>(q_shared, static_cast<const bf16*>(c.p.q), [&](int row) {
    return row < found.rows ? query_place(c, found.s, kv_head, found.row0 + row) : -1;
  });
  if (Paged) __syncthreads();
  fetch_keys(0);
  fetch_values(0);

  // The keys that the warp's first and last row see. A row beyond the last counts as the last.
  const int32_t warp_row = warp * Shape::kWarpRows;
  const auto visible = [&](int32_t row) {
    return t.s.visible(c, t.row0 + (row < t.rows ? row : t.rows - 1));
  };
  const int32_t least = warp_row < t.rows ? visible(warp_row) : 0;
  const int32_t most = warp_row < t.rows ? visible(warp_row + Shape::kWarpRows - 1) : 0;

  Softmax<D, M> state;
  state.clear();
  bf16* const q_warp = q_shared + warp_row * kPitch<D>;
  const bf16* const q_lane = q_warp + row_first(kPitch<D>);
  const auto load_q = [&](uint32_t (&a)[M][4], int d) {
#pragma unroll
    for (int m = 0; m < M; ++m) ldmatrix_x4(a[m], q_lane + 16 * m * kPitch<D> + d);
  };
  for (int tile = 0; tile * kKeys < t.end; ++tile) {
    // The keys are here (and the queries); nobody uses the values before them any more.
    if (tile == 0)
      cp_async_wait<1>();
    else
      cp_async_wait<0>();
    __syncthreads();
    if (tile > 0) fetch_values(tile);
    place_keys(tile + 1);
    const int32_t key0 = tile * kKeys;
    const bool busy = key0 < most;
    float scores[M][kKeys / 8][4];
    if (busy) multiply_keys<D, M, kKeys>(scores, load_q, k_shared);
    __syncthreads();  // nobody uses the keys any more
    if (key0 + kKeys < t.end)
      fetch_keys(tile + 1);
    else
      cp_async_commit();
    if (busy) {
      if (key0 + kKeys > least)
        mask_keys<M, kKeys>(scores, key0,
                            [&](int m, int h) { return visible(warp_row + 16 * m + 8 * h + lane / 4); });
      state.template add<kKeys>(scores, c.scale_log2);
    }
    cp_async_wait<1>();
    __syncthreads();  // the values are here
    if (busy) state.template add_values<kKeys>(scores, v_shared);
  }

  // Through the queries' memory, which is this warp's alone by now, into whole rows.
  state.finish_sums();
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float norm = 1.0f / state.sum[m][h];
      bf16* row = q_warp + (16 * m + 8 * h + lane / 4) * kPitch<D> + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        *reinterpret_cast<uint32_t*>(row + 8 * n) =
            pack_bf16(state.out[m][n][2 * h] * norm, state.out[m][n][2 * h + 1] * norm);
    }
  __syncwarp();
  const int32_t left = t.rows - warp_row, warp_rows = left < Shape::kWarpRows ? left : Shape::kWarpRows;
  for (int i = lane; i < warp_rows * kChunks; i += 32) {
    const int row = i / kChunks, column = i % kChunks * 8;
    store(out_row<bf16>(c, t.s, kv_head, t.row0 + warp_row + row) + column,
          load<8>(q_warp + row * kPitch<D> + column));
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
