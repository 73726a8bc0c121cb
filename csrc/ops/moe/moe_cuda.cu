// moe_route's choice of experts, moe_permute and moe_combine.
#include <limits>

#include "common/gpu.h"
#include "ops/moe/moe.h"
#include "ops/moe/route.cuh"

namespace ming::cuda {
namespace {

using namespace ming::gpu;

constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// --- choice: one warp per token ---

constexpr int kTokens = 4;  // of a block

// Scores in the order of unsigned numbers, NaN as -infinity, -0 as 0; never 0 itself.
__device__ __forceinline__ uint32_t key_of(float score) {
  const uint32_t u = __float_as_uint(score == score ? score + 0.0f : kNegInf);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// The ids of the k best of the warp's candidates, best first, ties to the lower id. Candidate lane + 32 i of
// each lane has key(i), 0 where there is none; kRounds is the number of i, or 0 where it is `rounds`. A round
// takes the best candidate behind the one found last, so that nothing needs to be marked.
template <int kRounds, typename Key>
__device__ __forceinline__ void choose(int rounds, int k, Key&& key, int32_t* ids) {
  const int lane = threadIdx.x % 32;
  uint32_t last = 0xffffffffu, last_id = 0;
  for (int j = 0; j < k; ++j) {
    uint32_t best = 0, best_id = 0xffffffffu;
    const auto look = [&](int i) {
      const uint32_t value = key(i), id = uint32_t(lane + 32 * i);
      if (value > best && (value < last || (value == last && id > last_id))) {
        best = value;
        best_id = id;
      }
    };
    if constexpr (kRounds > 0) {
#pragma unroll
      for (int i = 0; i < kRounds; ++i) look(i);
    } else {
      for (int i = 0; i < rounds; ++i) look(i);
    }
    last = warp_max(best);
    last_id = warp_min(best == last ? best_id : 0xffffffffu);
    if (lane == 0) ids[j] = int32_t(last_id);
  }
  __syncwarp();
}

// What a warp keeps in shared memory.
struct Work {
  int32_t ids[kMaxRouted];
  float values[kMaxRouted];        // scores of the groups, then of the chosen experts
  uint32_t kept[kMaxRouted / 32];  // a bit per group
};

// The scores of one token. Every lane gets all of them.
struct Scores {
  const float *logits, *bias;  // [E]; bias nullptr: softmax
  float most, sum;             // of softmax

  __device__ Scores(const float* logits_, const float* bias_, int experts)
      : logits(logits_), bias(bias_), most(kNegInf), sum(0) {
    if (bias) return;
    const int lane = threadIdx.x % 32;
    for (int e = lane; e < experts; e += 32) most = fmaxf(most, logits[e]);
    most = warp_max(most);
    for (int e = lane; e < experts; e += 32) sum += expf(logits[e] - most);
    sum = warp_sum(sum);
  }
  __device__ float plain(int e) const {
    return bias ? 1.0f / (1.0f + expf(-logits[e])) : expf(logits[e] - most) / sum;
  }
  __device__ float biased(int e) const { return bias ? plain(e) + bias[e] : plain(e); }
};

// Sets work.kept to the topk_group best groups.
template <typename Score>
__device__ __forceinline__ void keep_groups(const MoeRouteParams& p, Score&& score, Work& work) {
  const int lane = threadIdx.x % 32, size = p.experts / p.n_group;
  int lanes = 1;  // of a group
  while (2 * lanes * p.n_group <= 32) lanes *= 2;
  for (int first_group = 0; first_group < p.n_group; first_group += 32 / lanes) {
    const int group = first_group + lane / lanes;
    float first = kNegInf, second = kNegInf;
    if (group < p.n_group)
      for (int e = lane % lanes; e < size; e += lanes) {
        const float v = score(group * size + e);
        if (v > first) {
          second = first;
          first = v;
        } else if (v > second) {
          second = v;
        }
      }
    for (int bits = 1; bits < lanes; bits *= 2) {
      const float other = __shfl_xor_sync(kAllLanes, first, bits);
      second = fmaxf(fminf(first, other), fmaxf(second, __shfl_xor_sync(kAllLanes, second, bits)));
      first = fmaxf(first, other);
    }
    if (group < p.n_group && lane % lanes == 0) work.values[group] = first + second;
  }
  if (lane < kMaxRouted / 32) work.kept[lane] = 0;
  __syncwarp();
  const auto key = [&](int i) { return lane + 32 * i < p.n_group ? key_of(work.values[lane + 32 * i]) : 0; };
  choose<0>((p.n_group + 31) / 32, p.topk_group, key, work.ids);
  for (int j = lane; j < p.topk_group; j += 32)
    atomicOr(&work.kept[work.ids[j] / 32], 1u << work.ids[j] % 32);
  __syncwarp();
}

// kRounds * 32 experts or fewer; 0: any number, their scores computed at every look.
template <int kRounds>
__global__ void __launch_bounds__(32 * kTokens) choose_kernel(const MoeRouteParams p, DeviceStatus* status) {
  MING_SHARED(Work, works, [kTokens]);
  MING_SHARED(float, caches, [kTokens][kRounds ? 32 * kRounds : 1]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t token = int64_t(blockIdx.x) * kTokens + warp;
  if (token >= p.tokens) return;
  Work& work = works[warp];
  float* cache = caches[warp];
  const bool sigmoid = p.kind == RouterKind::grouped_sigmoid;
  if (p.modality && p.modality[token] >= p.routers_count && lane == 0)
    report(status, Fault::modality, p.modality[token]);

  const float* bias = sigmoid ? p.bias + int64_t(router_of(p, token)) * p.experts : nullptr;
  const Scores scores(p.logits + token * p.experts, bias, p.experts);
  if (kRounds) {
    for (int e = lane; e < p.experts; e += 32) cache[e] = scores.biased(e);
    __syncwarp();
  }
  const auto score = [&](int e) { return kRounds ? cache[e] : scores.biased(e); };
  const bool grouped = sigmoid && p.topk_group < p.n_group;
  if (grouped) keep_groups(p, score, work);
  const int size = sigmoid ? p.experts / p.n_group : p.experts;
  const auto key = [&](int i) {
    const int e = lane + 32 * i;
    if (e >= p.experts) return 0u;
    const int group = grouped ? e / size : 0;
    return key_of(!grouped || work.kept[group / 32] >> group % 32 & 1 ? score(e) : kNegInf);
  };
  if constexpr (kRounds > 0) {
    uint32_t keys[kRounds];
#pragma unroll
    for (int i = 0; i < kRounds; ++i) keys[i] = key(i);
    choose<kRounds>(kRounds, p.top_k, [&](int i) { return keys[i]; }, work.ids);
  } else {
    choose<0>((p.experts + 31) / 32, p.top_k, key, work.ids);
  }

  for (int j = lane; j < p.top_k; j += 32) {
    const int32_t id = work.ids[j];
    int place = 0;
    for (int i = 0; i < p.top_k; ++i) place += work.ids[i] < id;
    p.topk_ids[token * p.top_k + place] = id;
    work.values[place] = scores.plain(id);
  }
  __syncwarp();
  float sum = sigmoid ? 1e-20f : 0.0f;
  for (int j = 0; j < p.top_k; ++j) sum += work.values[j];
  const bool divide = p.top_k > 1 && (sigmoid || p.normalize);
  for (int j = lane; j < p.top_k; j += 32)
    p.topk_weights[token * p.top_k + j] = (divide ? work.values[j] / sum : work.values[j]) * p.scaling;
}

// --- permute: one block per expert ---

__device__ __forceinline__ int warp_total(int x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits >>= 1) x += __shfl_xor_sync(kAllLanes, x, bits);
  return x;
}

// The expert counts the slots of lower ids and its own: every warp those of its part of the list. A slot of
// an expert that does not exist goes to the first or last one, so that `rows` names each slot once whatever
// the ids are.
template <int Threads>
__global__ void __launch_bounds__(Threads) permute_kernel(const MoePermuteParams p, DeviceStatus* status) {
  constexpr int kWarps = Threads / 32;
  MING_SHARED(int, lower, [kWarps]);
  MING_SHARED(int, equal, [kWarps]);
  const int expert = int(blockIdx.x), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t part = ceil_div(p.slots, Threads) * 32, begin = warp * part;
  const int64_t end = begin + part < p.slots ? begin + part : p.slots;
  const int32_t* __restrict__ ids = p.topk_ids;
  int32_t* __restrict__ rows = p.rows;
  const auto inside = [&](int id) { return id < 0 ? 0 : id < p.experts ? id : p.experts - 1; };

  int below = 0, mine = 0;
#pragma unroll 4
  for (int64_t slot = begin + lane; slot < end; slot += 32) {
    const int given = ids[slot], id = inside(given);
    below += id < expert;
    mine += id == expert;
    if (expert == 0 && id != given) report(status, Fault::expert, given);
  }
  below = warp_total(below);
  mine = warp_total(mine);
  if (lane == 0) {
    lower[warp] = below;
    equal[warp] = mine;
  }
  __syncthreads();
  int first = 0, place = 0;
  for (int w = 0; w < kWarps; ++w) {
    first += lower[w];
    place += w < warp ? equal[w] : 0;
  }
  place += first;
  if (threadIdx.x == 0) {
    p.offsets[expert] = first;
    if (expert == p.experts - 1) p.offsets[p.experts] = int32_t(p.slots);
  }
  if (mine == 0) return;
  constexpr int kRounds = 4;  // whose ids are loaded before the first is used
  for (int64_t at = begin; at < end; at += 32 * kRounds) {
    bool is_mine[kRounds];
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int64_t slot = at + 32 * i + lane;
      is_mine[i] = slot < end && inside(ids[slot]) == expert;
    }
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const uint32_t votes = __ballot_sync(kAllLanes, is_mine[i]);
      if (is_mine[i]) rows[place + __popc(votes & ((1u << lane) - 1))] = int32_t(at + 32 * i + lane);
      place += __popc(votes);
    }
  }
}

// --- combine: a block takes a run of one token's row ---

constexpr int kCombineThreads = 128;
constexpr int kAhead = 8;  // experts whose values are on their way at once

template <typename T, int Step, bool Shared>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(const MoeCombineParams p) {
  constexpr bool kWideStep = Step == kWide<T>;
  MING_SHARED(uint4, rows, [kAhead][kWideStep ? kCombineThreads : 1]);
  const int64_t token = blockIdx.x, i = (int64_t(blockIdx.y) * kCombineThreads + threadIdx.x) * Step;
  if (i >= p.hidden) return;
  const T* in = static_cast<const T*>(p.expert_out) + token * p.top_k * p.hidden + i;
  const float* weights = p.topk_weights + token * p.top_k;
  T* y = static_cast<T*>(p.y) + token * p.hidden + i;
  Vec<T, Step> shared{};
  if constexpr (Shared) shared = load<Step>(static_cast<const T*>(p.shared) + token * p.shared_stride + i);
  float sum[Step] = {};
  for (int begin = 0; begin < p.top_k; begin += kAhead) {
    // Behind the last expert weights and values are zeros. Each thread waits for what it copied itself.
    float weight[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) weight[j] = begin + j < p.top_k ? weights[begin + j] : 0.0f;
    if constexpr (kWideStep) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const bool valid = begin + j < p.top_k;
        cp_async16(&rows[j][threadIdx.x], in + (valid ? begin + j : begin) * p.hidden, valid);
      }
      cp_async_commit();
      cp_async_wait<0>();
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      Vec<T, Step> v{};
      if constexpr (kWideStep)
        std::memcpy(&v, &rows[j][threadIdx.x], sizeof(v));
      else if (begin + j < p.top_k)
        v = load<Step>(in + (begin + j) * p.hidden);
#pragma unroll
      for (int s = 0; s < Step; ++s) sum[s] = fmaf(weight[j], to_float(v.at[s]), sum[s]);
    }
  }
  Vec<T, Step> out;
#pragma unroll
  for (int s = 0; s < Step; ++s)
    out.at[s] = from_float<T>(Shared ? rounded<T>(sum[s]) + to_float(shared.at[s]) : sum[s]);
  store_global(y, out);
}

template <typename T, int Step>
void combine(const MoeCombineParams& p, Stream stream) {
  const dim3 grid(uint32_t(p.tokens), uint32_t(ceil_div(p.hidden, kCombineThreads * Step)));
  if (p.shared)
    MING_LAUNCH((combine_kernel<T, Step, true>), grid, kCombineThreads, 0, stream, p);
  else
    MING_LAUNCH((combine_kernel<T, Step, false>), grid, kCombineThreads, 0, stream, p);
}

}  // namespace

void moe_route(const MoeRouteParams& p, Stream stream) {
  route_logits(p, stream);
  const dim3 grid{uint32_t(ceil_div(p.tokens, kTokens))};
  if (p.experts <= 64)
    MING_LAUNCH((choose_kernel<2>), grid, 32 * kTokens, 0, stream, p, device_status());
  else if (p.experts <= 256)
    MING_LAUNCH((choose_kernel<8>), grid, 32 * kTokens, 0, stream, p, device_status());
  else
    MING_LAUNCH((choose_kernel<0>), grid, 32 * kTokens, 0, stream, p, device_status());
}

void moe_permute(const MoePermuteParams& p, Stream stream) {
  const dim3 grid{uint32_t(p.experts)};
  if (p.slots <= 2048)
    MING_LAUNCH((permute_kernel<128>), grid, 128, 0, stream, p, device_status());
  else
    MING_LAUNCH((permute_kernel<1024>), grid, 1024, 0, stream, p, device_status());
}

void moe_combine(const MoeCombineParams& p, Stream stream) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const bool wide = p.hidden % kWide<T> == 0 && wide_rows<T>(p.expert_out, 0) && wide_rows<T>(p.y, 0) &&
                      wide_rows<T>(p.shared, p.shared_stride);
    wide ? combine<T, kWide<T>>(p, stream) : combine<T, 1>(p, stream);
  });
}

}  // namespace ming::cuda
