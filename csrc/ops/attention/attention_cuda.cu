// Which kernels a call takes, and the merge of split partials.
#include <climits>

#include "ops/attention/device.cuh"

namespace ming::cuda {
namespace attention_detail {
namespace {

static_assert(kMaxSplits == 32);  // a lane each

// A block per sequence and head; its warps take every fourth split, its lanes four columns each.
__global__ void __launch_bounds__(kThreads) merge_splits_kernel(const Call c, bool bf16_out) {
  MING_SHARED(float, outs, [kWarps][128]);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int32_t head = int32_t(blockIdx.x) % c.p.num_heads;
  const Sequence s = read_sequence(c, int32_t(blockIdx.x) / c.p.num_heads);
  const int64_t size = attention_split_keys(s.keys);
  if (s.queries > c.few || s.keys <= size) return;
  const int32_t splits = int32_t((s.keys + size - 1) / size);
  const Partials from = partials(c);
  for (int32_t query = 0; query < s.queries; ++query) {
    const int64_t slot = partial_slot(c, s, query, head);
    Vec<float, 2> stats{kMinusInf, 0};
    if (lane < splits) stats = load<2>(from.stats[slot + lane].at);
    const float weight = exp2_approx(stats.at[0] - warp_max(stats.at[0]));
    const float norm = 1.0f / warp_sum(weight * stats.at[1]);
    for (int32_t column0 = 0; column0 < c.p.head_dim; column0 += 128) {
      const int32_t column = column0 + 4 * lane;
      Vec<float, 4> out{};
#pragma unroll
      for (int i = 0; i < kMaxSplits / kWarps; ++i) {
        const int32_t split = warp + kWarps * i;
        const float share = __shfl_sync(kAllLanes, weight, split);
        if (split >= splits || share == 0 || column >= c.p.head_dim) continue;
        const auto part = load<4>(from.out + (slot + split) * from.width + column);
#pragma unroll
        for (int j = 0; j < 4; ++j) out.at[j] = fmaf(part.at[j], share, out.at[j]);
      }
      store(&outs[warp][4 * lane], out);
      __syncthreads();
      const int32_t mine = column0 + int32_t(threadIdx.x);
      if (mine < c.p.head_dim) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) sum += outs[i][threadIdx.x];
        const int64_t at = (s.base + query) * c.p.out_token_stride + head * c.p.out_head_stride + mine;
        if (bf16_out)
          static_cast<bf16*>(c.p.out)[at] = to_bf16(sum * norm);
        else
          static_cast<float*>(c.p.out)[at] = sum * norm;
      }
      __syncthreads();
    }
  }
}

bool on_tensor_cores(const AttentionParams& p) {
  const auto wide = [](const void* data, int64_t a, int64_t b, int64_t c) {
    return wide_rows<bf16>(data, a) && b % 8 == 0 && c % 8 == 0;
  };
  return p.dtype == DType::bf16 && !p.bias && tensor_core_dim(p.head_dim) &&
         wide(p.q, p.q_token_stride, p.q_head_stride, 0) &&
         wide(p.out, p.out_token_stride, p.out_head_stride, 0) &&
         wide(p.k, p.k_token_stride, p.k_head_stride, p.k_page_stride) &&
         wide(p.v, p.v_token_stride, p.v_head_stride, p.v_page_stride);
}

}  // namespace
}  // namespace attention_detail

void attention(const AttentionParams& p, Stream stream) {
  using namespace attention_detail;
  if (p.rows == 0 || p.batch == 0 || p.num_heads == 0) return;
  Call c{};
  c.p = p;
  c.status = device_status();
  c.group = Divisor::of(p.num_heads / p.num_kv_heads);
  c.page = Divisor::of(p.page_table ? p.page_size : 1);
  c.scale_log2 = p.scale * 1.44269504088896341f;
  const bool fast = on_tensor_cores(p);
  if (!p.page_table) return fast ? tile_attention(c, stream) : plain_tile_attention(c, stream);

  // The host does not know which sequences have few queries, but whether there can be others.
  const bool tiles = p.rows > kFewQueries && p.rows != p.batch;
  c.few = tiles ? kFewQueries : INT_MAX;
  c.max_splits = int32_t(attention_max_splits(p.max_pages * p.page_size));
  if (tiles) fast ? tile_attention(c, stream) : plain_tile_attention(c, stream);
  fast ? split_attention(c, stream) : plain_split_attention(c, stream);
  if (c.max_splits > 1)
    MING_LAUNCH(merge_splits_kernel, dim3(uint32_t(p.batch * p.num_heads)), kThreads, 0, stream, c,
                p.dtype == DType::bf16);
}

}  // namespace ming::cuda
