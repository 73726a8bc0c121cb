// Attention of few queries over long paged keys on tensor cores: a block takes one split of a sequence's keys
// for all heads that share them. Its warps share the rows and take 16 keys of every 64 each, which they
// stream through shared memory of their own, two tiles ahead, without a barrier.
#include "ops/attention/device.cuh"
#include "ops/attention/fragments.cuh"

namespace ming::cuda::attention_detail {
namespace {

constexpr int kRows = 16;      // of a pass; more rows read the keys again
constexpr int kWarpKeys = 16;  // of a warp per tile
constexpr int kStages = 2;

template <int D>
struct SplitShape {
  static constexpr int kPart = kWarpKeys * kPitch<D>;  // keys or values of a warp's tile
  static constexpr int kBytes = kWarps * kStages * 2 * kPart * int(sizeof(bf16));
  static constexpr int kOutPitch = D + 8;  // of a merged output in floats
  static_assert(kWarps * kRows * kOutPitch * int(sizeof(float)) <= kBytes);
};

// Operand a of the rows, which lie in device memory.
template <int D>
__device__ __forceinline__ void load_queries(uint32_t (&q)[D / 16][4], const Call& c, const Sequence& s,
                                             int kv_head, int32_t row0, int32_t rows) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int32_t row = lane / 4 + 8 * h;
    const bf16* from = query_row<bf16>(c, s, kv_head, row0 + (row < rows ? row : 0)) + lane % 4 * 2;
#pragma unroll
    for (int d = 0; d < D / 16; ++d)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        q[d][h + 2 * i] = row < rows ? *reinterpret_cast<const uint32_t*>(from + 16 * d + 8 * i) : 0;
  }
}

template <int D>
__global__ void __launch_bounds__(kThreads, 3) split_kernel(const Call c) {
  using Shape = SplitShape<D>;
  MING_DYNAMIC_SHARED(bf16, shared);
  MING_SHARED(float, stats, [kWarps][kRows][2]);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, kv_head = int(blockIdx.y);
  const Split w = read_split(c);
  const bf16 *const keys = head_keys<bf16>(c, kv_head), *const values = head_values<bf16>(c, kv_head);
  bf16* const mine = shared + warp * kStages * 2 * Shape::kPart;

  for (int32_t row0 = 0; row0 < w.rows; row0 += kRows) {
    const int32_t rows = w.rows - row0 < kRows ? w.rows - row0 : kRows;
    const int32_t seen = w.s.visible(c, row0 + rows - 1), end = seen < w.end ? seen : w.end;
    const int32_t first = w.begin + warp * kWarpKeys,
                  tiles = end > w.begin ? (end - w.begin + kKeys - 1) / kKeys : 0;

    const auto place_of = [&](int tile) {
      return find_key(c, w.s, first + tile * kKeys + lane % kWarpKeys, end);
    };
    const auto fetch_tile = [&](int tile, Place place) {
      if (tile < tiles) {
        bf16* const to = mine + tile % kStages * 2 * Shape::kPart;
        copy_rows<D, 32, kWarpKeys>(to, keys, [&](int key) { return __shfl_sync(kAllLanes, place.k, key); });
        copy_rows<D, 32, kWarpKeys>(to + Shape::kPart, values,
                                    [&](int key) { return __shfl_sync(kAllLanes, place.v, key); });
      }
      cp_async_commit();
    };
    fetch_tile(0, place_of(0));
    fetch_tile(1, place_of(1));
    Place next = place_of(2);  // its way to the cache is known a tile before it is needed

    uint32_t q[D / 16][4];
    load_queries<D>(q, c, w.s, kv_head, row0, rows);
    const auto load_q = [&](uint32_t (&a)[1][4], int d) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[0][i] = q[d / 16][i];
    };
    int32_t limit[2];  // keys that this thread's two rows see; a row beyond the last counts as the last
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int32_t row = lane / 4 + 8 * h;
      limit[h] = w.s.visible(c, row0 + (row < rows ? row : rows - 1));
    }
    Softmax<D, 1> state;
    state.clear();
    for (int tile = 0; tile < tiles; ++tile) {
      const int32_t key0 = first + tile * kKeys;
      const bf16* const k = mine + tile % kStages * 2 * Shape::kPart;
      cp_async_wait<kStages - 1>();
      __syncwarp();
      if (key0 < end) {
        float scores[1][kWarpKeys / 8][4];
        multiply_keys<D, 1, kWarpKeys>(scores, load_q, k);
        mask_keys<1, kWarpKeys>(scores, key0, [&](int, int h) { return limit[h]; });
        state.template add<kWarpKeys>(scores, c.scale_log2);
        state.template add_values<kWarpKeys>(scores, k + Shape::kPart);
      }
      __syncwarp();
      fetch_tile(tile + kStages, next);
      next = place_of(tile + kStages + 1);
    }
    state.finish_sums();
    cp_async_wait<0>();
    __syncthreads();

    // The warps' parts, one below the other, and their sum.
    float* const outs = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int32_t row = lane / 4 + 8 * h;
      if (lane % 4 == 0) {
        stats[warp][row][0] = state.max[0][h];
        stats[warp][row][1] = state.sum[0][h];
      }
      float* const to = outs + (warp * kRows + row) * Shape::kOutPitch + lane % 4 * 2;
      if (row < rows)
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
          store(to + 8 * n, Vec<float, 2>{state.out[0][n][2 * h], state.out[0][n][2 * h + 1]});
    }
    __syncthreads();
    for (int32_t row = warp; row < rows; row += kWarps) {
      float max = kMinusInf, sum = 0, weight[kWarps];
#pragma unroll
      for (int i = 0; i < kWarps; ++i) max = fmaxf(max, stats[i][row][0]);
      const float shift = max == kMinusInf ? 0.0f : max;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        weight[i] = exp2_approx(stats[i][row][0] - shift);
        sum = fmaf(stats[i][row][1], weight[i], sum);
      }
      const SplitRow<bf16> to = split_row<bf16>(c, w, kv_head, row0 + row, max, sum);
      const int column = lane * 4;
      if (column >= D) continue;
      Vec<float, 4> out{};
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        const auto part = load<4>(outs + (i * kRows + row) * Shape::kOutPitch + column);
#pragma unroll
        for (int j = 0; j < 4; ++j) out.at[j] = fmaf(part.at[j], weight[i], out.at[j]);
      }
      to.put(column, out);
    }
    __syncthreads();
  }
}

}  // namespace

void split_attention(const Call& c, Stream stream) {
  with_tensor_core_dim(c.p.head_dim, [&](auto dim) {
    constexpr int D = decltype(dim)::value;
    const dim3 grid(uint32_t(c.p.batch * c.max_splits), uint32_t(c.p.num_kv_heads));
    MING_LAUNCH((split_kernel<D>), grid, kThreads, SplitShape<D>::kBytes, stream, c);
  });
}

}  // namespace ming::cuda::attention_detail
