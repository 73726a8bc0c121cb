// logits[t] = x[t] W_r^T with the router r of each token, in fp32. Three kernels:
//
//   few rows    up to kFewTokens tokens: a block reads the weights of one or two experts once and multiplies
//               them with every token of its router. Thread i takes values 4i.. of every 1024; then warps and
//               block are summed in their order. How many tokens and experts it takes at a time changes no
//               sum.
//   split tile  bfloat16 rows of whole 16-byte pieces: a float32 weight is exactly the sum of three bfloat16
//               numbers, so three tensor-core products with exact terms give it. The tensor core cuts its
//               sums instead of rounding them: after every 32 values they are added to a float32 sum.
//   plain tile  everything else: fused multiply-adds over ascending k.
//
// Tiles of tokens that share no router with a block are left by it at once; a tile with several routers is
// computed by a block for each, which stores its own tokens only.
#include "ops/moe/route.cuh"

namespace ming::cuda {
namespace {

using namespace ming::gpu;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kFewTokens = 64;
constexpr int kFewThreads = 256;
constexpr int kFewStep = 4 * kFewThreads;  // values of k that a block takes at a time

__device__ __forceinline__ int64_t weight_row(const MoeRouteParams& p) {
  return row_elements(DType::f32, WeightFormat::plain, p.hidden);
}

// Values k.. k + 3 of a row of x, zeros behind its end.
template <bool Wide, typename T>
__device__ __forceinline__ Vec<T, 4> four(const T* row, int64_t k, int64_t hidden) {
  Vec<T, 4> v{};
  if constexpr (Wide) {
    if (k < hidden) v = load<4>(row + k);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (k + i < hidden) v.at[i] = row[k + i];
  }
  return v;
}

// `Steps` pieces of the weights and tokens are on their way at once.
template <typename T, int Tokens, int Experts, int Steps, bool Wide>
__global__ void __launch_bounds__(kFewThreads) few_rows_kernel(const MoeRouteParams p) {
  MING_SHARED(float4, weights, [Experts][Steps][kFewThreads]);
  MING_SHARED(float, partial, [kFewThreads / 32][Tokens * Experts]);
  MING_SHARED(int, mine, [kFewTokens]);  // the tokens of this router
  MING_SHARED(int, counts, [2]);
  const int router = int(blockIdx.y), first = int(blockIdx.x) * Experts;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t kp = weight_row(p);
  const float* w = p.routers + (int64_t(router) * p.experts + first) * kp;

  int count = int(p.tokens);
  if (p.modality) {
    const int token = int(threadIdx.x);
    const bool is_mine = token < count && router_of(p, token) == router;
    const uint32_t votes = __ballot_sync(kAllLanes, is_mine);
    if (warp < 2 && lane == 0) counts[warp] = __popc(votes);
    __syncthreads();
    if (is_mine) mine[(warp ? counts[0] : 0) + __popc(votes & ((1u << lane) - 1))] = token;
    count = counts[0] + counts[1];
  } else if (int(threadIdx.x) < count) {
    mine[threadIdx.x] = int(threadIdx.x);
  }
  __syncthreads();

  for (int begin = 0; begin < count; begin += Tokens) {
    const T* x[Tokens];
    float sum[Tokens][Experts] = {};
#pragma unroll
    for (int t = 0; t < Tokens; ++t)
      x[t] = static_cast<const T*>(p.x) + mine[begin + t < count ? begin + t : begin] * p.x_stride;
    for (int64_t chunk = 0; chunk < kp; chunk += Steps * kFewStep) {
      const int64_t k0 = chunk + threadIdx.x * 4;
      // Weights that fit stay for all tokens. Each thread waits for and reads what it copied itself.
      if (begin == 0 || kp > Steps * kFewStep) {
#pragma unroll
        for (int s = 0; s < Steps; ++s)
#pragma unroll
          for (int e = 0; e < Experts; ++e) {
            const bool valid = k0 + s * kFewStep < kp && first + e < p.experts;
            cp_async16(&weights[e][s][threadIdx.x], valid ? w + e * kp + k0 + s * kFewStep : p.routers,
                       valid);
          }
        cp_async_commit();
      }
      // On their way together with the weights.
      Vec<T, 4> v[Steps][Tokens];
#pragma unroll
      for (int s = 0; s < Steps; ++s)
#pragma unroll
        for (int t = 0; t < Tokens; ++t) v[s][t] = four<Wide>(x[t], k0 + s * kFewStep, p.hidden);
      cp_async_wait<0>();
#pragma unroll
      for (int s = 0; s < Steps; ++s)
#pragma unroll
        for (int e = 0; e < Experts; ++e) {
          const float4 u = weights[e][s][threadIdx.x];
          const float values[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
          for (int t = 0; t < Tokens; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[t][e] = fmaf(to_float(v[s][t].at[i]), values[i], sum[t][e]);
        }
    }
#pragma unroll
    for (int t = 0; t < Tokens; ++t)
#pragma unroll
      for (int e = 0; e < Experts; ++e) {
        const float total = warp_sum(sum[t][e]);
        if (lane == 0) partial[warp][t * Experts + e] = total;
      }
    __syncthreads();
    const int t = int(threadIdx.x) / Experts, expert = first + int(threadIdx.x) % Experts;
    if (t < Tokens && begin + t < count && expert < p.experts) {
      float total = 0;
      for (int i = 0; i < kFewThreads / 32; ++i) total += partial[i][threadIdx.x];
      p.logits[int64_t(mine[begin + t]) * p.experts + expert] = total;
    }
    __syncthreads();
  }
}

// Whether one of the tokens [first, first + count) has the router; every thread of the block asks.
__device__ __forceinline__ bool any_token(const MoeRouteParams& p, int64_t first, int count, int router) {
  if (!p.modality) return true;
  MING_SHARED(int, found, [1]);
  if (threadIdx.x == 0) found[0] = 0;
  __syncthreads();
  const int64_t token = first + threadIdx.x;
  if (int(threadIdx.x) < count && token < p.tokens && router_of(p, token) == router) found[0] = 1;
  __syncthreads();
  return found[0] != 0;
}

// Whether a tile of this router is to store the logits of a token.
__device__ __forceinline__ bool stores(const MoeRouteParams& p, int64_t token, int router) {
  return token < p.tokens && router_of(p, token) == router;
}

// --- split tile ---

// Three pairs of bfloat16 whose sums are exactly two floats: the largest parts first.
struct Parts {
  uint32_t at[3];
  __device__ explicit Parts(const Vec<float, 2>& v) {
    float low = v.at[0], high = v.at[1];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      at[i] = pack_bf16(low, high);
      low -= __uint_as_float(at[i] << 16);
      high -= __uint_as_float(at[i] & 0xffff0000u);
    }
  }
};

constexpr int kTileExperts = 64;
constexpr int kDepth = 32;  // values of k per stage
constexpr int kStages = 3;
constexpr int kPitch = kDepth + 8;  // of a row in shared memory: no two rows of a read in one bank

template <int Tiles>  // 16 tokens each
__global__ void __launch_bounds__(kThreads) split_tile_kernel(const MoeRouteParams p) {
  constexpr int kTokens = 16 * Tiles, kColumns = kTileExperts / kWarps / 8;
  MING_SHARED(bf16, xs, [kStages][kTokens * kPitch]);
  MING_SHARED(float, ws, [kStages][kTileExperts * kPitch]);
  const int64_t first_token = int64_t(blockIdx.x) * kTokens, kp = weight_row(p);
  const int first_expert = int(blockIdx.y) * kTileExperts, router = int(blockIdx.z);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (!any_token(p, first_token, kTokens, router)) return;
  const bf16* x = static_cast<const bf16*>(p.x);
  const float* weights = p.routers + int64_t(router) * p.experts * kp;

  const auto fetch = [&](int step) {
    const int stage = step % kStages;
#pragma unroll
    for (int i = threadIdx.x; i < kTokens * (kDepth / 8); i += kThreads) {
      const int row = i / (kDepth / 8), column = i % (kDepth / 8) * 8;
      const int64_t token = first_token + row, k = int64_t(step) * kDepth + column;
      const bool valid = token < p.tokens && k < p.hidden;
      cp_async16(&xs[stage][row * kPitch + column], valid ? x + token * p.x_stride + k : x, valid);
    }
#pragma unroll
    for (int i = threadIdx.x; i < kTileExperts * (kDepth / 4); i += kThreads) {
      const int row = i / (kDepth / 4), column = i % (kDepth / 4) * 4;
      const int64_t expert = first_expert + row, k = int64_t(step) * kDepth + column;
      const bool valid = expert < p.experts && k < kp;
      cp_async16(&ws[stage][row * kPitch + column], valid ? weights + expert * kp + k : weights, valid);
    }
  };

  float sum[Tiles][kColumns][4] = {};
  const int steps = int(ceil_div(p.hidden, kDepth));
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) fetch(step);
    cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps) fetch(step + kStages - 1);
    cp_async_commit();
    float part[Tiles][kColumns][4] = {};
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[Tiles][4];
#pragma unroll
      for (int i = 0; i < Tiles; ++i)
        ldmatrix_x4(a[i], &xs[step % kStages][(16 * i + lane % 16) * kPitch + k + lane / 16 * 8]);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int row = (warp * kColumns + j) * 8 + lane / 4;
        const float* w = &ws[step % kStages][row * kPitch + k + lane % 4 * 2];
        const Parts near(load<2>(w)), far(load<2>(w + 8));
#pragma unroll
        for (int n = 2; n >= 0; --n) {
          const uint32_t b[2] = {near.at[n], far.at[n]};
#pragma unroll
          for (int i = 0; i < Tiles; ++i) mma_bf16(part[i][j], a[i], b);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Tiles; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[i][j][c] += part[i][j][c];
  }
#pragma unroll
  for (int i = 0; i < 2 * Tiles; ++i) {
    const int64_t token = first_token + 8 * i + lane / 4;
    if (!stores(p, token, router)) continue;
#pragma unroll
    for (int j = 0; j < 2 * kColumns; ++j) {
      const int expert = first_expert + (warp * kColumns + j / 2) * 8 + lane % 4 * 2 + j % 2;
      if (expert < p.experts) p.logits[token * p.experts + expert] = sum[i / 2][j / 2][i % 2 * 2 + j % 2];
    }
  }
}

// --- plain tile ---

constexpr int kPlainTokens = 32;
constexpr int kPlainPad = 4;  // keeps rows of shared memory apart and 16-byte aligned

template <typename T>
__global__ void __launch_bounds__(kThreads) plain_tile_kernel(const MoeRouteParams p) {
  MING_SHARED(float, xs, [kDepth][kPlainTokens + kPlainPad]);
  MING_SHARED(float, ws, [kDepth][kTileExperts + kPlainPad]);
  const int64_t first_token = int64_t(blockIdx.x) * kPlainTokens, kp = weight_row(p);
  const int first_expert = int(blockIdx.y) * kTileExperts, router = int(blockIdx.z);
  if (!any_token(p, first_token, kPlainTokens, router)) return;
  const T* x = static_cast<const T*>(p.x);
  const float* weights = p.routers + int64_t(router) * p.experts * kp;
  const int token0 = int(threadIdx.x) / 16 * 4, expert0 = int(threadIdx.x) % 16 * 4;

  float sum[4][4] = {};
  for (int64_t begin = 0; begin < p.hidden; begin += kDepth) {
#pragma unroll
    for (int i = threadIdx.x; i < kPlainTokens * kDepth; i += kThreads) {
      const int64_t token = first_token + i / kDepth, k = begin + i % kDepth;
      const bool valid = token < p.tokens && k < p.hidden;
      xs[i % kDepth][i / kDepth] = valid ? to_float(x[token * p.x_stride + k]) : 0.0f;
    }
#pragma unroll
    for (int i = threadIdx.x; i < kTileExperts * kDepth; i += kThreads) {
      const int64_t expert = first_expert + i / kDepth, k = begin + i % kDepth;
      ws[i % kDepth][i / kDepth] = expert < p.experts && k < kp ? weights[expert * kp + k] : 0.0f;
    }
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < kDepth; ++k) {
      const Vec<float, 4> a = load<4>(&xs[k][token0]), b = load<4>(&ws[k][expert0]);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(a.at[i], b.at[j], sum[i][j]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t token = first_token + token0 + i;
    if (!stores(p, token, router)) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int expert = first_expert + expert0 + j;
      if (expert < p.experts) p.logits[token * p.experts + expert] = sum[i][j];
    }
  }
}

template <typename T, int Tokens, int Experts>
void few_rows(const MoeRouteParams& p, uint32_t routers, Stream stream) {
  const dim3 grid(uint32_t(ceil_div(p.experts, Experts)), routers);
  if (p.hidden <= 2 * kFewStep)
    MING_LAUNCH((few_rows_kernel<T, Tokens, Experts, 2, true>), grid, kFewThreads, 0, stream, p);
  else
    MING_LAUNCH((few_rows_kernel<T, Tokens, Experts, 4, true>), grid, kFewThreads, 0, stream, p);
}

template <typename T>
void few_rows(const MoeRouteParams& p, uint32_t routers, Stream stream) {
  if (p.hidden % 4 != 0 || !wide_rows<float>(p.x, p.x_stride))
    MING_LAUNCH((few_rows_kernel<T, 2, 1, 2, false>), dim3(uint32_t(p.experts), routers), kFewThreads, 0,
                stream, p);
  else if (p.tokens == 1)
    few_rows<T, 1, 1>(p, routers, stream);
  else if (p.tokens <= 4)
    few_rows<T, 4, 1>(p, routers, stream);
  else if (p.experts < 128)
    few_rows<T, 8, 1>(p, routers, stream);
  else  // blocks enough to read each token half as often
    few_rows<T, 4, 2>(p, routers, stream);
}

dim3 tiles(const MoeRouteParams& p, int tokens, uint32_t routers) {
  return dim3(uint32_t(ceil_div(p.tokens, tokens)), uint32_t(ceil_div(p.experts, kTileExperts)), routers);
}

template <typename T>
void logits(const MoeRouteParams& p, Stream stream) {
  const uint32_t routers = p.modality ? uint32_t(p.routers_count < 256 ? p.routers_count : 256) : 1;
  if (p.tokens <= kFewTokens) return few_rows<T>(p, routers, stream);
  if constexpr (sizeof(T) == 2) {
    if (p.hidden % kWide<T> == 0 && wide_rows<T>(p.x, p.x_stride)) {
      const dim3 large = tiles(p, 64, routers);
      if (large.x * large.y >= uint32_t(sm_count()))
        MING_LAUNCH((split_tile_kernel<4>), large, kThreads, 0, stream, p);
      else
        MING_LAUNCH((split_tile_kernel<2>), tiles(p, 32, routers), kThreads, 0, stream, p);
      return;
    }
  }
  MING_LAUNCH((plain_tile_kernel<T>), tiles(p, kPlainTokens, routers), kThreads, 0, stream, p);
}

}  // namespace

void route_logits(const MoeRouteParams& p, Stream stream) {
  with_dtype(p.dtype, [&](auto t) { logits<decltype(t)>(p, stream); });
}

}  // namespace ming::cuda
