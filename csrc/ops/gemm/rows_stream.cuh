// Few rows of x: a block streams 16 rows of a packed weight once for up to 32 rows of x, which stay in the
// first cache. Bound by memory.
//
// bfloat16 x: the tensor cores take rows of x as a and 8 weight rows as b. The order of k inside an mma is
// free as long as both agree, so that lane (g, t) = (lane / 4, lane % 4) reads 16 consecutive bytes of the
// weight rows g and g + 8 straight into its registers, and the same k of the rows g, g + 8, .. of x.
// Quantised values times bfloat16 are exact; a group's sums are scaled once.
// float32 x: each warp has two weight rows, each lane a part of k.
//
// Steps go round the warps (lanes in fp32), whose sums are added in their order: the order depends on k
// alone.
#pragma once

#include "common/gpu.h"
#include "ops/gemm/gemm.h"

namespace ming::gpu {

constexpr int kTileRows = 16;  // weight rows of a block
constexpr int kStreamWarps = 8;
constexpr int kStreamThreads = 32 * kStreamWarps;

// One packed weight in memory.
struct WeightRows {
  const unsigned char* data;
  const bf16* scales;
  int64_t rows, bytes, groups;  // of all; of a row
};

// Weight `index` of a stack, for inputs of type T.
template <typename T, WeightFormat F, typename Params>
__device__ __forceinline__ WeightRows weight_rows(const Params& p, bool gated, int64_t index) {
  constexpr DType kDtype = sizeof(T) == 4 ? DType::f32 : DType::bf16;
  const int64_t rows = row_count(p.n, gated), bytes = row_bytes(kDtype, F, p.k), groups = row_scales(p.k);
  return {static_cast<const unsigned char*>(p.w) + index * rows * bytes,
          static_cast<const bf16*>(p.scales) + (F == WeightFormat::plain ? 0 : index * rows * groups), rows,
          bytes, groups};
}

// What a lane reads of a weight row in one step.
template <typename T, WeightFormat F>
struct Part {
  using Word = uint4;
  static constexpr int kValues = F == WeightFormat::int8 ? 16 : kWide<T>;
};
template <typename T>
struct Part<T, WeightFormat::int4> {
  using Word = uint2;
  static constexpr int kValues = 16;
};

// Count values of x from k on; beyond `end` and in a row nullptr they are zeros. Wide: rows are aligned to 16
// bytes and `end` is a multiple of Count.
template <int Count, bool Wide, typename T>
__device__ __forceinline__ Vec<T, Count> read_x(const T* row, int k, int end) {
  Vec<T, Count> v{};
  if constexpr (Wide) {
    if (row && k < end) {
#pragma unroll
      for (int i = 0; i < Count; i += kWide<T>) {
        const Vec<T, kWide<T>> part = load<kWide<T>>(row + k + i);
#pragma unroll
        for (int j = 0; j < kWide<T>; ++j) v.at[i + j] = part.at[j];
      }
    }
  } else if (row) {
#pragma unroll
    for (int i = 0; i < Count; ++i)
      if (k + i < end) v.at[i] = row[k + i];
  }
  return v;
}

// --- bfloat16 ---

// Pairs of bfloat16, in the order of k for plain weights and int8; int4 has k, k + 4 of each 8 as a pair.
__device__ __forceinline__ void to_pairs(uint4 w, uint32_t (&pairs)[4]) {
  pairs[0] = w.x, pairs[1] = w.y, pairs[2] = w.z, pairs[3] = w.w;
}
__device__ __forceinline__ void to_pairs(uint4 w, uint32_t (&pairs)[8]) {
  const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    // q = (128 + low 7 bits) - (128, or 256 with the sign bit), all of them bfloat16 numbers
    const uint32_t spread = __byte_perm(words[i / 2], 0, i % 2 ? 0x4342 : 0x4140);
    pairs[i] = add_bf16x2((spread & 0x007f007f) | 0x43004300, (spread & 0x00800080) | 0xc300c300);
  }
}
__device__ __forceinline__ void to_pairs(uint2 w, uint32_t (&pairs)[8]) {
  const uint32_t words[2] = {w.x, w.y};
#pragma unroll
  for (int i = 0; i < 8; ++i)  // (128 + nibble) - 136
    pairs[i] = add_bf16x2((words[i / 4] >> (4 * (i % 4)) & 0x000f000f) | 0x43004300, 0xc308c308);
}

// Two bfloat16 per register, in the order of k.
template <bool Wide, int Pairs>
__device__ __forceinline__ void read_pairs(const bf16* row, int k, int end, uint32_t (&pairs)[Pairs]) {
  if constexpr (Wide) {
#pragma unroll
    for (int i = 0; i < Pairs; i += 4) {
      uint4 v = make_uint4(0, 0, 0, 0);
      if (row && k < end) v = *reinterpret_cast<const uint4*>(row + k + 2 * i);
      pairs[i] = v.x, pairs[i + 1] = v.y, pairs[i + 2] = v.z, pairs[i + 3] = v.w;
    }
  } else {
    const Vec<bf16, 2 * Pairs> v = read_x<2 * Pairs, false>(row, k, end);
#pragma unroll
    for (int i = 0; i < Pairs; ++i) pairs[i] = v.at[2 * i].bits | uint32_t(v.at[2 * i + 1].bits) << 16;
  }
}

// Pair i of x in the order of the weight's pairs.
template <WeightFormat F, int Pairs>
__device__ __forceinline__ uint32_t matching(const uint32_t (&x)[Pairs], int i) {
  if constexpr (F == WeightFormat::int4) {
    const int from = i / 4 * 4 + i % 4 / 2;
    return __byte_perm(x[from], x[from + 2], i % 2 ? 0x7632 : 0x5410);
  } else {
    return x[i];
  }
}

// Sums of 16 weight rows and Rows rows of x over this warp's steps, to partial[row of x][weight row].
template <WeightFormat F, int Rows, bool Wide>
__device__ __forceinline__ void warp_sums(const WeightRows& w, int64_t first, const bf16* x_base,
                                          const int64_t* x_rows, int k, float (*partial)[kTileRows]) {
  using Lane = Part<bf16, F>;
  using Word = typename Lane::Word;
  constexpr bool kQuantised = F != WeightFormat::plain;
  constexpr int kPairs = Lane::kValues / 2, kStep = 4 * Lane::kValues;
  constexpr int kDepth = !Wide ? 1 : Rows == 32 ? 2 : Rows == 16 && kQuantised ? 3 : 4;  // steps under way
  constexpr int kTiles = (Rows + 15) / 16;        // an mma takes 16 rows of x
  constexpr int kBetween = kStep * kStreamWarps;  // distances between steps are constants, pointers run
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int end = int(row_elements(DType::bf16, F, k));
  int at = warp * kStep + t * Lane::kValues;  // the lane's k in the first step under way
  const unsigned char* data[2];
  const bf16* scale[2];
  const bf16* from[Rows / 8];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t mine = first + g + 8 * i < w.rows ? first + g + 8 * i : first;  // absent: any other
    data[i] = w.data + mine * w.bytes + (warp * 4 + t) * sizeof(Word);
    scale[i] = kQuantised ? w.scales + mine * w.groups + warp : nullptr;
  }
#pragma unroll
  for (int i = 0; i < Rows / 8; ++i) from[i] = x_rows[8 * i + g] < 0 ? nullptr : x_base + x_rows[8 * i + g];

  Word words[kDepth][2];
  bf16 scales[kDepth][2];
  uint32_t x[Rows / 8][kPairs];
  const auto read_weight = [&](int slot, int ahead) {
    const bool inside = at + ahead * kBetween < end;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      words[slot][i] = inside ? load_once<Word>(data[i] + ahead * kStreamWarps * 4 * sizeof(Word)) : Word{};
      if constexpr (kQuantised) scales[slot][i] = inside ? scale[i][ahead * kStreamWarps] : bf16{};
    }
  };
  const auto read_input = [&](int ahead) {
#pragma unroll
    for (int i = 0; i < Rows / 8; ++i) read_pairs<Wide>(from[i], at + ahead * kBetween, k, x[i]);
  };

  float sums[kTiles][2][4] = {};  // of weight rows below 8 and from 8 on
#pragma unroll
  for (int d = 0; d < kDepth; ++d) read_weight(d, d);
  read_input(0);
#pragma unroll 1
  for (int step = warp * kStep; step < k; step += kDepth * kBetween) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t b[kPairs];
        to_pairs(words[d][half], b);
        float scale_of[2];  // of the lane's columns of the sums
        if constexpr (kQuantised)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            scale_of[i] = __shfl_sync(kAllLanes, to_float(scales[d][half]), 4 * (2 * t + i));
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          float group[4] = {};
          float (&into)[4] = kQuantised ? group : sums[tile][half];
#pragma unroll
          for (int i = 0; i < kPairs; i += 2) {
            uint32_t a[4] = {matching<F>(x[2 * tile], i), 0, matching<F>(x[2 * tile], i + 1), 0};
            if constexpr (Rows > 8) {
              a[1] = matching<F>(x[2 * tile + 1], i);
              a[3] = matching<F>(x[2 * tile + 1], i + 1);
            }
            mma_bf16(into, a, {b[i], b[i + 1]});
          }
          if constexpr (kQuantised)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[tile][half][i] += scale_of[i % 2] * group[i];
        }
      }
      read_input(d + 1);
      read_weight(d, d + kDepth);
    }
    at += kDepth * kBetween;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      data[i] += kDepth * kStreamWarps * 4 * sizeof(Word);
      scale[i] += kDepth * kStreamWarps;
    }
  }
#pragma unroll
  for (int i = 0; i < Rows / 8 * 4; ++i)
    partial[8 * (i / 4) + g][2 * t + i % 2 + i % 4 / 2 * 8] = sums[i / 8][i % 4 / 2][i / 4 % 2 * 2 + i % 2];
}

// --- float32 ---

__device__ __forceinline__ void to_floats(uint4 w, float (&values)[4]) {
  const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = __uint_as_float(words[i]);
}
// Of integers: a number put into the fraction of 2^23 is 2^23 more.
__device__ __forceinline__ void to_floats(uint4 w, float (&values)[16]) {
  const uint32_t words[4] = {w.x ^ 0x80808080u, w.y ^ 0x80808080u, w.z ^ 0x80808080u, w.w ^ 0x80808080u};
#pragma unroll
  for (int i = 0; i < 16; ++i)
    values[i] = __uint_as_float((words[i / 4] >> (8 * (i % 4)) & 0xff) | 0x4b000000u) - 8388736.0f;
}
__device__ __forceinline__ void to_floats(uint2 w, float (&values)[16]) {
  const uint32_t words[2] = {w.x, w.y};
#pragma unroll
  for (int i = 0; i < 16; ++i)
    values[i] = __uint_as_float((words[i / 8] >> (4 * (i % 8)) & 0xf) | 0x4b000000u) - 8388616.0f;
}

// Sums of this warp's two weight rows and the rows of x that are there, to partial[row of x][weight row].
template <WeightFormat F, bool Wide>
__device__ __forceinline__ void warp_sums(const WeightRows& w, int64_t first, const float* x_base,
                                          const int64_t* x_rows, int k, float (*partial)[kTileRows]) {
  using Lane = Part<float, F>;
  using Word = typename Lane::Word;
  constexpr int kRows = 8, kStep = 32 * Lane::kValues;
  const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 * 2;
  const int64_t row[2] = {first + mine, first + mine + 1};

  float sums[2][kRows] = {};
#pragma unroll 2
  for (int begin = lane * Lane::kValues; begin < k; begin += kStep) {
    float values[2][Lane::kValues], scales[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool inside = row[i] < w.rows;
      const int64_t at = begin / Lane::kValues * int64_t(sizeof(Word));
      to_floats(inside ? load_once<Word>(w.data + row[i] * w.bytes + at) : Word{}, values[i]);
      if (F != WeightFormat::plain && inside)
        scales[i] = to_float(w.scales[row[i] * w.groups + begin / kQuantGroup]);
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      if (x_rows[j] < 0) continue;  // the same for the whole warp
      const Vec<float, Lane::kValues> x = read_x<Lane::kValues, Wide>(x_base + x_rows[j], begin, k);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = F == WeightFormat::plain ? sums[i][j] : 0.0f;
#pragma unroll
        for (int v = 0; v < Lane::kValues; ++v) sum += x.at[v] * values[i][v];
        sums[i][j] = F == WeightFormat::plain ? sum : sums[i][j] + scales[i] * sum;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const float sum = warp_sum(sums[i][j]);
      if (lane == 0) partial[j][mine + i] = sum;
    }
}

// --- both ---

struct Source {
  int64_t x;  // a row of x from its first element on, or -1: none, and nothing is stored
  int64_t y;  // the row its outputs go to
};

// The outputs of weight rows [first, first + 16) for `count` rows of x, in passes of Rows.
//   source(i): row i, asked for by one thread
//   store_one(y row, output, sum), or with `gated` store_pair(y row, output, gate sum, up sum)
template <typename T, WeightFormat F, int Rows, bool Wide, typename SourceOf, typename StoreOne,
          typename StorePair>
__device__ __forceinline__ void stream_tile(const WeightRows& w, int64_t first, const T* x, int64_t count,
                                            int64_t k, bool gated, SourceOf&& source, StoreOne&& store_one,
                                            StorePair&& store_pair) {
  constexpr bool kSimt = sizeof(T) == 4;
  constexpr int kPlanes = kSimt ? 1 : kStreamWarps;
  static_assert(Rows == 8 || (!kSimt && (Rows == 16 || Rows == 32)));
  MING_SHARED(int64_t, x_rows, [Rows]);
  MING_SHARED(int64_t, y_rows, [Rows]);
  MING_SHARED(float, partial, [kPlanes][Rows][kTileRows]);

  for (int64_t begin = 0; begin < count; begin += Rows) {
    if (threadIdx.x < Rows) {
      Source from{-1, 0};
      if (begin + threadIdx.x < count) from = source(begin + threadIdx.x);
      x_rows[threadIdx.x] = from.x;
      y_rows[threadIdx.x] = from.y;
    }
    __syncthreads();
    if constexpr (kSimt)
      warp_sums<F, Wide>(w, first, x, x_rows, int(k), partial[0]);
    else
      warp_sums<F, Rows, Wide>(w, first, x, x_rows, int(k), partial[threadIdx.x / 32]);
    __syncthreads();
    const auto total = [&](int row, int column) {
      float sum = 0;
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) sum += partial[plane][row][column];
      return sum;
    };
    const int bits = gated ? 3 : 4;  // 8 or 16 outputs
    for (int i = threadIdx.x; i < Rows << bits; i += kStreamThreads) {
      const int row = i >> bits, column = i & ((1 << bits) - 1);
      const int64_t output = (gated ? first / 2 : first) + column;
      if (x_rows[row] < 0 || output >= (gated ? w.rows / 2 : w.rows)) continue;
      if (gated)
        store_pair(y_rows[row], output, total(row, 2 * column), total(row, 2 * column + 1));
      else
        store_one(y_rows[row], output, total(row, column));
    }
    __syncthreads();
  }
}

template <typename T, WeightFormat F, int Rows, bool Wide>
struct StreamKernel {
  using Type = T;
  static constexpr WeightFormat kFormat = F;
  static constexpr int kRows = Rows;
  static constexpr bool kWideRows = Wide;
};

template <typename T, WeightFormat F, typename Launch>
inline void with_format_kernel(bool wide, int64_t rows, Launch&& launch) {
  if (!wide) return launch(StreamKernel<T, F, 8, false>());
  if constexpr (sizeof(T) == 2) {
    if (rows > 16 && F == WeightFormat::plain)
      return launch(StreamKernel<T, WeightFormat::plain, 32, true>());
    if (rows > 8) return launch(StreamKernel<T, F, 16, true>());
  }
  launch(StreamKernel<T, F, 8, true>());
}

// Calls launch(StreamKernel) with the form for these operands, of which `rows` rows of x come together.
template <typename Params, typename Launch>
inline void with_stream_kernel(const Params& p, int64_t rows, Launch&& launch) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const bool aligned = wide_rows<T>(p.x, p.x_stride);
    switch (p.format) {
      case WeightFormat::int8:
        return with_format_kernel<T, WeightFormat::int8>(aligned && p.k % 16 == 0, rows, launch);
      case WeightFormat::int4:
        return with_format_kernel<T, WeightFormat::int4>(aligned && p.k % 16 == 0, rows, launch);
      default:
        return with_format_kernel<T, WeightFormat::plain>(aligned && p.k % kWide<T> == 0, rows, launch);
    }
  });
}

}  // namespace ming::gpu
