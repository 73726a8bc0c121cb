#include "common/scratch.h"
#include "common/simd.h"
#include "common/thread_pool.h"
#include "ops/gemm/panel.h"
#include "ops/moe/moe.h"

namespace ming {
namespace MING_ISA {
namespace {

enum Slot { kRowScratch, kScoreScratch, kOrderScratch, kGroupScratch };

constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// A set of rows that share one weight: places [begin, end) of an order, cut into blocks of `block` rows.
// Every block times every panel of the weight is one work item; first_item numbers them through all groups.
struct Group {
  int32_t weight;
  int64_t begin, end, block, first_item;
};

// Appends a group of `rows` rows; returns the number of items so far.
int64_t add_group(Group* group, int32_t weight, int64_t begin, int64_t end, int64_t block, int64_t panels,
                  int64_t items) {
  const int64_t blocks = (end - begin + block - 1) / block;
  *group = {weight, begin, end, ((end - begin + blocks - 1) / blocks + 11) / 12 * 12, items};
  return items + (end - begin + group->block - 1) / group->block * panels;
}

// Runs work(weight, panel, begin, end) for all items of the groups.
template <typename Work>
void for_groups(const Group* groups, int count, int64_t items, int64_t panels, int64_t grain, Work&& work) {
  parallel_for(items, grain, [&](int64_t item, int64_t last) {
    int low = 0, high = count;  // the last group whose first item is <= item
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (groups[middle].first_item <= item ? low : high) = middle;
    }
    for (; item < last; ++item) {
      while (low + 1 < count && groups[low + 1].first_item <= item) ++low;
      const Group& g = groups[low];
      const int64_t local = item - g.first_item;
      const int64_t begin = g.begin + local / panels * g.block;
      work(g.weight, local % panels, begin, begin + g.block < g.end ? begin + g.block : g.end);
    }
  });
}

// --- routing ---

const float* as_float(const float* row, int64_t, float*) {
  return row;
}
const float* as_float(const bf16* row, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + VF <= n; i += VF) vstore(to + i, vload(row + i));
  for (; i < n; ++i) to[i] = to_float(row[i]);
  return to;
}

template <typename T>
void route_logits(const MoeRouteParams& p) {
  const int64_t panels = panel_count(p.experts, false), size = panel_size(DType::f32, p.hidden);
  const int64_t block = rows_per_item(p.tokens, panels, num_threads());
  Group* groups = scratch<Group>(kGroupScratch, p.routers_count);
  int32_t* order = scratch<int32_t>(kOrderScratch, p.tokens);  // tokens sorted by router
  int count = 0;
  int64_t items = 0, place = 0;
  for (int32_t router = 0; router < p.routers_count; ++router) {
    const int64_t begin = place;
    for (int64_t t = 0; t < p.tokens; ++t)
      if ((p.modality ? p.modality[t] : 0) == router) order[place++] = int32_t(t);
    if (place > begin) items = add_group(groups + count++, router, begin, place, block, panels, items);
  }
  const T* x = static_cast<const T*>(p.x);
  const int64_t width = (p.hidden + 15) / 16 * 16;
  for_groups(groups, count, items, panels, item_grain(block, p.hidden),
             [&](int32_t router, int64_t panel, int64_t begin, int64_t end) {
               const float* w = p.routers + (router * panels + panel) * size;
               const int64_t column = panel * kPanelColumns;
               const int columns =
                   int(p.experts - column < kPanelColumns ? p.experts - column : kPanelColumns);
               float* wide = scratch<float>(kRowScratch, tile_rows<float>() * width);  // the rows of one tile
               panel_rows<float>(
                   begin, end, w, p.hidden,
                   [&](int64_t i) {
                     return as_float(x + order[i] * p.x_stride, p.hidden,
                                     wide + (i - begin) % tile_rows<float>() * width);
                   },
                   [&](int64_t i, const float* sums) {
                     store_plain(sums, columns, p.logits + order[i] * int64_t(p.experts) + column);
                   });
             });
}

// The ids of the k largest of n scores, in descending order of score; ties and NaN as moe.h says.
void choose(const float* scores, int n, int k, int32_t* ids) {
  float best[kMaxRouted];
  int count = 0;
  for (int e = 0; e < n; ++e) {
    const float score = scores[e] == scores[e] ? scores[e] : kNegInf;
    if (count == k && !(score > best[k - 1])) continue;
    int at = count < k ? count++ : k - 1;
    for (; at > 0 && score > best[at - 1]; --at) {
      best[at] = best[at - 1];
      ids[at] = ids[at - 1];
    }
    best[at] = score;
    ids[at] = e;
  }
}

void sort_ids(int32_t* ids, int k) {
  for (int i = 1; i < k; ++i) {
    const int32_t id = ids[i];
    int at = i;
    for (; at > 0 && ids[at - 1] > id; --at) ids[at] = ids[at - 1];
    ids[at] = id;
  }
}

template <typename F>
void map_scores(const float* from, float* to, int n, F&& f) {
  for (int e = 0; e < n; e += VF) vstore_n(to + e, f(vload_n(from + e, n - e)), n - e);
}

void softmax_scores(const float* logits, float* scores, int n) {
  float most = kNegInf;
  for (int e = 0; e < n; ++e) most = logits[e] > most ? logits[e] : most;
  map_scores(logits, scores, n, [&](vf v) { return vexp(v - vset(most)); });
  float sum = 0.0f;
  for (int e = 0; e < n; ++e) sum += scores[e];
  map_scores(scores, scores, n, [&](vf v) { return v / vset(sum); });
}

// biased[e] = -infinity outside the topk_group best groups
void mask_groups(const MoeRouteParams& p, float* biased) {
  const int size = p.experts / p.n_group;
  float group_scores[kMaxRouted] = {};
  int32_t kept[kMaxRouted];
  for (int g = 0; g < p.n_group; ++g) {
    float first = kNegInf, second = kNegInf;
    for (int e = g * size; e < (g + 1) * size; ++e) {
      const float v = biased[e];
      if (v > first) {
        second = first;
        first = v;
      } else if (v > second) {
        second = v;
      }
    }
    group_scores[g] = first + second;
  }
  choose(group_scores, p.n_group, p.topk_group, kept);
  sort_ids(kept, p.topk_group);
  for (int g = 0, next = 0; g < p.n_group; ++g) {
    if (next < p.topk_group && kept[next] == g) {
      ++next;
      continue;
    }
    for (int e = g * size; e < (g + 1) * size; ++e) biased[e] = kNegInf;
  }
}

void route_token(const MoeRouteParams& p, int64_t token, float* scores, float* biased) {
  const float* logits = p.logits + token * p.experts;
  int32_t* ids = p.topk_ids + token * p.top_k;
  float* weights = p.topk_weights + token * p.top_k;
  const bool sigmoid = p.kind == RouterKind::grouped_sigmoid;
  if (sigmoid) {
    const float* bias = p.bias + (p.modality ? p.modality[token] : 0) * int64_t(p.experts);
    map_scores(logits, scores, p.experts, [](vf v) { return vsigmoid(v); });
    for (int e = 0; e < p.experts; ++e) biased[e] = scores[e] + bias[e];
    mask_groups(p, biased);
    choose(biased, p.experts, p.top_k, ids);
  } else {
    softmax_scores(logits, scores, p.experts);
    choose(scores, p.experts, p.top_k, ids);
  }
  sort_ids(ids, p.top_k);
  float sum = sigmoid ? 1e-20f : 0.0f;
  for (int j = 0; j < p.top_k; ++j) sum += scores[ids[j]];
  const bool divide = p.top_k > 1 && (sigmoid || p.normalize);
  for (int j = 0; j < p.top_k; ++j) {
    const float w = scores[ids[j]];
    weights[j] = (divide ? w / sum : w) * p.scaling;
  }
}

// --- grouped products ---

template <typename T, bool kGated>
void grouped_gemm(const GroupedGemmParams& p) {
  const int64_t outputs = panel_outputs(kGated), panels = panel_count(p.n, kGated);
  const int64_t size = panel_size(p.dtype, p.k);
  const int64_t most = rows_per_item(p.slots, panels, num_threads());
  Group* groups = scratch<Group>(kGroupScratch, p.experts);
  int count = 0;
  int64_t items = 0;
  for (int32_t e = 0; e < p.experts; ++e)
    if (p.offsets[e + 1] > p.offsets[e])
      items = add_group(groups + count++, e, p.offsets[e], p.offsets[e + 1], most, panels, items);
  const int64_t typical = count ? p.slots / count : 0;
  const T* x = static_cast<const T*>(p.x);
  const T* w = static_cast<const T*>(p.w);
  T* y = static_cast<T*>(p.y);
  for_groups(groups, count, items, panels, item_grain(typical < most ? typical : most, p.k),
             [&](int32_t expert, int64_t panel, int64_t begin, int64_t end) {
               const int64_t column = panel * outputs;
               const int columns = int(p.n - column < outputs ? p.n - column : outputs);
               panel_rows<T>(
                   begin, end, w + (expert * panels + panel) * size, p.k,
                   [&](int64_t i) { return x + (kGated ? p.rows[i] / p.top_k : i) * p.x_stride; },
                   [&](int64_t i, const float* sums) {
                     if constexpr (kGated)
                       store_gated(sums, columns, y + i * p.y_stride + column);
                     else
                       store_plain(sums, columns, y + p.rows[i] * p.y_stride + column);
                   });
             });
}

template <typename T>
void combine_row(const MoeCombineParams& p, int64_t token) {
  const T* in = static_cast<const T*>(p.expert_out) + token * p.top_k * p.hidden;
  const T* shared = static_cast<const T*>(p.shared);
  if (shared) shared += token * p.shared_stride;
  const float* weights = p.topk_weights + token * p.top_k;
  T* y = static_cast<T*>(p.y) + token * p.hidden;
  for (int64_t i = 0; i < p.hidden; i += VF) {
    auto load = [&](const T* from) { return vload_n(from + i, p.hidden - i); };
    vf sum = vzero();
    for (int j = 0; j < p.top_k; ++j) sum = vfma(vset(weights[j]), load(in + j * p.hidden), sum);
    if (shared) sum = vrounded<T>(sum) + load(shared);
    vstore_n(y + i, sum, p.hidden - i);
  }
}

}  // namespace

void moe_route(const MoeRouteParams& p) {
  p.dtype == DType::f32 ? route_logits<float>(p) : route_logits<bf16>(p);
  parallel_for(p.tokens, grain_of(4 * int64_t(p.experts)), [&](int64_t begin, int64_t end) {
    float* scores = scratch<float>(kScoreScratch, 2 * int64_t(p.experts));
    for (int64_t token = begin; token < end; ++token) route_token(p, token, scores, scores + p.experts);
  });
}

void moe_permute(const MoePermuteParams& p) {
  int32_t* offsets = p.offsets;
  for (int32_t e = 0; e <= p.experts; ++e) offsets[e] = 0;
  // Each count is kept one place up, so that the running sum leaves every expert its first place.
  for (int64_t i = 0; i < p.slots; ++i) ++offsets[p.topk_ids[i] + 1];
  for (int32_t e = 0; e < p.experts; ++e) offsets[e + 1] += offsets[e];
  int32_t* next = scratch<int32_t>(kOrderScratch, p.experts + 1);
  for (int32_t e = 0; e < p.experts; ++e) next[e] = offsets[e];
  for (int64_t i = 0; i < p.slots; ++i) p.rows[next[p.topk_ids[i]]++] = int32_t(i);
}

void grouped_gemm_swiglu(const GroupedGemmParams& p) {
  p.dtype == DType::f32 ? grouped_gemm<float, true>(p) : grouped_gemm<bf16, true>(p);
}

void grouped_gemm_down(const GroupedGemmParams& p) {
  p.dtype == DType::f32 ? grouped_gemm<float, false>(p) : grouped_gemm<bf16, false>(p);
}

void moe_combine(const MoeCombineParams& p) {
  parallel_for(p.tokens, grain_of(p.hidden * (p.top_k + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token)
      p.dtype == DType::f32 ? combine_row<float>(p, token) : combine_row<bf16>(p, token);
  });
}

}  // namespace MING_ISA
}  // namespace ming
