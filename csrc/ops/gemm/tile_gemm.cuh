// One output tile of a matrix product on tensor cores, and what tile kernels share: the operands, the order
// of blocks, the epilogue.
//
// x and weight pieces of 16 bytes travel to shared memory by cp.async, kStages - 1 steps of kK ahead. The
// pieces of a row are permuted (x_offset, w_offset) so that every read and write below touches each bank
// once per wavefront.
#pragma once

#include <type_traits>

#include "common/gpu.h"
#include "ops/gemm/epilogue.cuh"
#include "ops/gemm/gemm.h"

namespace ming::cuda::tile {

using namespace ming::gpu;

// ---------------------------------------------------------------- operands

// Where sums go: `columns` weight rows, two per output if gated.
struct Output {
  void* y;
  const void *residual, *bias;  // or nullptr
  int64_t y_stride, residual_stride;
  int columns;
  DType dtype, bias_dtype;  // dtype: of y and residual
  Act act;
  bool gated;
  bool vectors;  // rows of y and residual can be accessed in the outputs of four columns
};

struct Operands {
  const void* x;
  int64_t x_stride;
  int k;
  bool wide;               // rows of x can be read 16 bytes at a time
  const unsigned char* w;  // [w_rows][w_row_bytes] per group
  int64_t w_row_bytes;
  int w_rows;
  const bf16* scales;  // [w_rows][scale_count] per group
  int scale_count;
  WeightFormat format;
  Output out;
};

template <typename Params>
inline Operands operands(const Params& p, bool gated, const Output& out) {
  const bool f32 = p.dtype == DType::f32;
  Operands o;
  o.x = p.x;
  o.x_stride = p.x_stride;
  o.k = int(p.k);
  o.wide =
      f32 ? wide_rows<float>(p.x, p.x_stride) : wide_rows<bf16>(p.x, p.x_stride) && p.k % kWide<bf16> == 0;
  o.w = static_cast<const unsigned char*>(p.w);
  o.w_row_bytes = row_bytes(p.dtype, p.format, p.k);
  o.w_rows = int(row_count(p.n, gated));
  o.scales = static_cast<const bf16*>(p.scales);
  o.scale_count = int(row_scales(p.k));
  o.format = p.format;
  o.out = out;
  o.out.columns = o.w_rows;
  o.out.gated = gated;
  const int64_t unit = (gated ? 2 : 4) * (out.dtype == DType::f32 ? 4 : 2);
  const auto aligned = [&](const void* data, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % unit == 0 && stride % (gated ? 2 : 4) == 0;
  };
  o.out.vectors =
      aligned(out.y, out.y_stride) && (!out.residual || aligned(out.residual, out.residual_stride));
  return o;
}

// Block `id` of a rectangle of tiles. Neighbours in time share weights and, within a band of eight tiles in
// m, rows of x: both stay in the L2 cache.
struct TileIndex {
  int m, n;
};
__device__ __forceinline__ TileIndex tile_index(int id, int m_tiles, int n_tiles) {
  constexpr int kBand = 8;
  const int first = id / (kBand * n_tiles) * kBand, local = id - first * n_tiles;
  const int height = m_tiles - first < kBand ? m_tiles - first : kBand;
  return {first + local % height, local / height};
}

// ---------------------------------------------------------------- epilogue

// The epilogue works on quads, the sums of four weight rows from `column` on, a multiple of four.
__device__ __forceinline__ void quad_bias(const Output& o, int column, float (&bias)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int c = column + i, at = o.gated ? c / 2 + (c % 2 ? o.columns / 2 : 0) : c;
    bias[i] = !o.bias || c >= o.columns    ? 0.0f
              : o.bias_dtype == DType::f32 ? static_cast<const float*>(o.bias)[at]
                                           : to_float(static_cast<const bf16*>(o.bias)[at]);
  }
}

template <typename T>
__device__ __forceinline__ void quad_residual(const Output& o, int64_t row, int column, float (&r)[4]) {
  const T* from = static_cast<const T*>(o.residual) + row * o.residual_stride + column;
  if (o.vectors && column + 4 <= o.columns) {
    const Vec<T, 4> v = load<4>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = to_float(v.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = column + i < o.columns ? to_float(from[i]) : 0.0f;
  }
}

template <int Count, typename T>
__device__ __forceinline__ void store_outputs(T* to, const float* v, int present, bool vectors) {
  Vec<T, Count> out;
#pragma unroll
  for (int i = 0; i < Count; ++i) out.at[i] = from_float<T>(v[i]);
  if (vectors && present >= Count) {
    store(to, out);
  } else {
#pragma unroll
    for (int i = 0; i < Count; ++i)
      if (i < present) to[i] = out.at[i];
  }
}

// Writes the outputs of a quad; v: sums with bias.
template <typename T>
__device__ __forceinline__ void finish_quad(const Output& o, int64_t row, int column, float (&v)[4],
                                            const float (&residual)[4]) {
  T* y = static_cast<T*>(o.y) + row * o.y_stride;
  if (o.gated) {
    const float outputs[2] = {silu(v[0]) * v[1], silu(v[2]) * v[3]};
    store_outputs<2>(y + column / 2, outputs, (o.columns - column) / 2, o.vectors);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[i] = activate(o.act, v[i]);
    if (o.residual) v[i] = rounded<T>(v[i]) + residual[i];
  }
  store_outputs<4>(y + column, v, o.columns - column, o.vectors);
}

// ---------------------------------------------------------------- tiles

// kM x kN outputs in steps of kK, by WarpsM x WarpsN warps; Blocks: how many shall fit a multiprocessor.
template <WeightFormat Format, int M, int N, int K, int Stages, int WarpsM, int WarpsN, int Blocks>
struct Shape {
  static constexpr WeightFormat kFormat = Format;
  static constexpr bool kPlain = Format == WeightFormat::plain;
  static constexpr int kM = M, kN = N, kK = K, kStages = Stages, kWarpsN = WarpsN, kBlocks = Blocks;
  static constexpr int kThreads = 32 * WarpsM * WarpsN;
  static constexpr int kWarpM = M / WarpsM, kWarpN = N / WarpsN;
  // Fragments of a warp. Quantised weights are the first factor of mma_bf16 and x the second, so that both
  // are made in the registers where it expects them; a fragment of sums is transposed then.
  static constexpr int kMStep = kPlain ? 16 : 8, kNStep = kPlain ? 8 : 16;
  static constexpr int kMs = kWarpM / kMStep, kNs = kWarpN / kNStep;
  // Bytes of a row, pieces of 16 bytes, and rows the block copies at once.
  static constexpr int kXRow = 2 * K, kXPieces = kXRow / 16, kXRows = kThreads / kXPieces;
  static constexpr int kWRow = kPlain ? 2 * K : Format == WeightFormat::int8 ? K : K / 2;
  static constexpr int kWPieces = kWRow / 16, kWRows = kThreads / kWPieces;
  // A stage: x, weights, scales.
  static constexpr int kWAt = M * kXRow, kScalesAt = kWAt + N * kWRow;
  static constexpr int kStageBytes = kScalesAt + (kPlain ? 0 : 2 * N);
  // After the last step each warp's sums lie there; the pitch spreads a fragment over the banks.
  static constexpr int kPitch = kWarpN + (kPlain ? 8 : 4), kSumsBytes = 4 * kWarpM * kPitch * WarpsM * WarpsN;
  static constexpr int kSharedBytes = Stages * kStageBytes > kSumsBytes ? Stages * kStageBytes : kSumsBytes;

  static_assert(M % kXRows == 0 && N % kWRows == 0 && kMs * kMStep * WarpsM == M &&
                kNs * kNStep * WarpsN == N);
  static_assert(kPlain ? K == 32 || K == 64 : K == kQuantGroup && N <= kThreads);
  static_assert((kNs % 2 == 0 || !kPlain) && kSharedBytes <= (99 << 10));
};

template <class S>
__device__ __forceinline__ int x_offset(int row, int piece) {
  if constexpr (!S::kPlain)
    piece ^= (row & 1) << 2;
  else
    piece ^= S::kK == 64 ? row & 7 : row >> 1 & 3;
  return row * S::kXRow + 16 * piece;
}
template <class S>
__device__ __forceinline__ int w_offset(int row, int piece) {
  if constexpr (S::kFormat == WeightFormat::int8)
    piece ^= row & 2;
  else if constexpr (S::kFormat == WeightFormat::int4)
    piece ^= row >> 2 & 1;
  else
    piece ^= S::kK == 64 ? row & 7 : row >> 1 & 3;
  return S::kWAt + row * S::kWRow + 16 * piece;
}

// Brings the steps of a tile to shared memory. Each thread copies the same pieces of every step; what it can
// work out again is not kept, the sums need the registers.
// w, scales: of the group; x_row(r): row of x of the tile's row r, or -1.
template <class S, typename XRow>
class Loader {
 public:
  __device__ __forceinline__ Loader(const Operands& o, const unsigned char* w, const bf16* scales,
                                    int first_column, const XRow& x_row)
      : o_(o), x_row_(x_row) {
    const int t = threadIdx.x, row = t / S::kWPieces, piece = t % S::kWPieces;
    w_left_ = o.w_rows - first_column - row;
    w_ = w + (first_column + row) * o.w_row_bytes + 16 * piece;
    if constexpr (!S::kPlain) {
      const bool mine = t < S::kN && first_column + t < o.w_rows;
      scales_ = mine ? scales + int64_t(first_column + t) * o.scale_count : nullptr;
    }
  }

  __device__ __forceinline__ void copy(unsigned char* stage, int step) const {
    const int t = threadIdx.x;
    copy_x(stage + x_offset<S>(t / S::kXPieces, t % S::kXPieces), step * S::kK + t % S::kXPieces * 8);

    unsigned char* const to = stage + w_offset<S>(t / S::kWPieces, t % S::kWPieces);
    const unsigned char* from = w_ + int64_t(step) * S::kWRow;
    // The last step of plain weights may reach beyond the row.
    const bool inside = !S::kPlain || step * S::kK + t % S::kWPieces * 8 < o_.k;
#pragma unroll
    for (int i = 0; i < S::kN / S::kWRows; ++i, from += S::kWRows * o_.w_row_bytes)
      cp_async16(to + i * S::kWRows * S::kWRow, from, inside && i * S::kWRows < w_left_);
  }

  // The scale of this thread's column in a step; it goes into the stage once the load had time to finish.
  __device__ __forceinline__ bf16 scale(int step) const { return scales_ ? scales_[step] : bf16{0}; }
  __device__ __forceinline__ void keep_scale(unsigned char* stage, bf16 scale) const {
    if (threadIdx.x < S::kN) reinterpret_cast<bf16*>(stage + S::kScalesAt)[threadIdx.x] = scale;
  }

 private:
  __device__ __forceinline__ void copy_x(unsigned char* to, int k) const {
    constexpr int kPasses = S::kM / S::kXRows, kPassBytes = S::kXRows * S::kXRow;
    const bf16* const x = static_cast<const bf16*>(o_.x) + k;
    if (o_.wide) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const int64_t row = x_row_(int(threadIdx.x) / S::kXPieces + i * S::kXRows);
        cp_async16(to + i * kPassBytes, x + row * o_.x_stride, row >= 0 && k < o_.k);
      }
      return;
    }
#pragma unroll 1  // rows of any alignment, value by value: slow and rare
    for (int i = 0; i < kPasses; ++i) {
      const int64_t row = x_row_(int(threadIdx.x) / S::kXPieces + i * S::kXRows);
      Vec<bf16, 8> v;
#pragma unroll
      for (int j = 0; j < 8; ++j) v.at[j] = row >= 0 && k + j < o_.k ? x[row * o_.x_stride + j] : bf16{0};
      store(reinterpret_cast<bf16*>(to + i * kPassBytes), v);
    }
  }

  const Operands& o_;
  const XRow& x_row_;
  const unsigned char* w_;
  int w_left_;
  const bf16* scales_ = nullptr;
};

// Where a warp stands in the tile, and a lane in the fragments of mma_bf16.
template <class S>
struct Place {
  int lane, row, column;  // first row and column of the warp
  __device__ __forceinline__ Place() {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    row = warp / S::kWarpsN * S::kWarpM;
    column = warp % S::kWarpsN * S::kWarpN;
  }
};

template <class S>
using Sums = float[S::kMs][S::kNs][4];

template <class S>
struct Fragments {
  uint32_t x[S::kMs][4], w[S::kNs / 2][4];

  // The 16 k from 16 * part on of a stage.
  __device__ __forceinline__ void read(const unsigned char* stage, const Place<S>& at, int part) {
#pragma unroll
    for (int i = 0; i < S::kMs; ++i)
      ldmatrix_x4(x[i], stage + x_offset<S>(at.row + 16 * i + at.lane % 16, 2 * part + at.lane / 16));
#pragma unroll
    for (int j = 0; j < S::kNs / 2; ++j)
      ldmatrix_x4(w[j], stage + w_offset<S>(at.column + 16 * j + at.lane % 8 + at.lane / 16 * 8,
                                            2 * part + at.lane / 8 % 2));
  }

  __device__ __forceinline__ void multiply(Sums<S>& sums) const {
#pragma unroll
    for (int i = 0; i < S::kMs; ++i) {
#pragma unroll
      for (int j = 0; j < S::kNs; ++j) {
        const uint32_t b[2] = {w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]};
        mma_bf16(sums[i][j], x[i], b);
      }
    }
  }
};

template <class S>
__device__ __forceinline__ int next_slot(int slot) {
  return slot + 1 == S::kStages ? 0 : slot + 1;
}

// The fragments of the next 16 k are read while the tensor cores work on these; a step's slot is refilled
// after the barrier that all its readers have passed.
template <class S, class Loader>
__device__ __forceinline__ void sum_plain(unsigned char* shared, const Loader& loader, int steps, int rows,
                                          Sums<S>& sums) {
  constexpr int kParts = S::kK / 16;
  const Place<S> at;
#pragma unroll
  for (int s = 0; s < S::kStages - 1; ++s) {
    if (s < steps) loader.copy(shared + s * S::kStageBytes, s);
    cp_async_commit();
  }
  cp_async_wait<S::kStages - 2>();
  __syncthreads();

  Fragments<S> fragments[2];
  fragments[0].read(shared, at, 0);
  int slot = 0, free = S::kStages - 1;
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (part == kParts - 1) {
        slot = next_slot<S>(slot);
        cp_async_wait<S::kStages - 2>();
        __syncthreads();
      }
      fragments[(part + 1) % 2].read(shared + slot * S::kStageBytes, at, (part + 1) % kParts);
      if (part == 0) {
        if (step + S::kStages - 1 < steps) loader.copy(shared + free * S::kStageBytes, step + S::kStages - 1);
        cp_async_commit();
        free = next_slot<S>(free);
      }
      if (at.row < rows) fragments[part % 2].multiply(sums);
    }
  }
}

// Eight integers as bfloat16 pairs. Seven bits as the mantissa of 128 are 128 plus their number.
__device__ __forceinline__ void integers_to_bf16(uint2 bytes, uint32_t (&pairs)[4]) {
  const uint32_t word[2] = {bytes.x, bytes.y};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t two = __byte_perm(word[i / 2], 0, i % 2 ? 0x4342 : 0x4140);
    // 128 + the low seven bits, less 128, or less 256 where the sign bit is set: exact.
    pairs[i] = add_bf16x2(and_or(two, 0x007f007f, 0x43004300), and_or(two, 0x00800080, 0xc300c300));
  }
}
__device__ __forceinline__ void integers_to_bf16(uint32_t nibbles, uint32_t (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t two = __byte_perm(nibbles, nibbles >> 4, (4 + i) << 8 | i);  // byte i and its high half
    pairs[i] = add_bf16x2(and_or(two, 0x000f000f, 0x43004300), 0xc308c308);     // 128 + q + 8, less 136
  }
}

// One step is one group of k. A lane takes 8 adjacent k of each 32 from its rows of the weights and of x: the
// order of k inside the group is free.
template <class S>
__device__ __forceinline__ void sum_group(const unsigned char* stage, const Place<S>& at, int rows,
                                          Sums<S>& sums) {
  const int g = at.lane / 4, t = at.lane % 4;
  const bf16* scales = reinterpret_cast<const bf16*>(stage + S::kScalesAt);
  uint32_t w[S::kNs][4][4];  // [16 columns][16 k]
  float scale[S::kNs][2];
#pragma unroll
  for (int j = 0; j < S::kNs; ++j) {
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      const int column = at.column + 16 * j + 8 * high + g;
      scale[j][high] = to_float(scales[column]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t pairs[4];
        if constexpr (S::kFormat == WeightFormat::int8)
          integers_to_bf16(
              *reinterpret_cast<const uint2*>(stage + w_offset<S>(column, 2 * half + t / 2) + t % 2 * 8),
              pairs);
        else
          integers_to_bf16(*reinterpret_cast<const uint32_t*>(stage + w_offset<S>(column, half) + t * 4),
                           pairs);
#pragma unroll
        for (int i = 0; i < 4; ++i) w[j][2 * half + i / 2][i % 2 * 2 + high] = pairs[i];
      }
    }
  }
  uint4 x[2][2][2];  // of this and the next 16 rows: [8 rows][32 k]
  const auto read_x = [&](int i) {
#pragma unroll
    for (int part = 0; part < 4; ++part)
      x[i % 2][part / 2][part % 2] = *reinterpret_cast<const uint4*>(
          stage + x_offset<S>(at.row + 16 * i + part / 2 * 8 + g, part % 2 * 4 + t));
  };
  read_x(0);
#pragma unroll
  for (int i = 0; i < S::kMs / 2; ++i) {
    if (i + 1 < S::kMs / 2) read_x(i + 1);
    // Besides the work it saves, the branch keeps the compiler from having more sums of groups under way than
    // there are registers for.
    if (at.row + 16 * i >= rows) break;
    float group[2][S::kNs][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint4& v = x[i % 2][r][half];
        const uint32_t first[2] = {v.x, v.y}, second[2] = {v.z, v.w};
#pragma unroll
        for (int j = 0; j < S::kNs; ++j) {
          mma_bf16(group[r][j], w[j][2 * half], first);
          mma_bf16(group[r][j], w[j][2 * half + 1], second);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int j = 0; j < S::kNs; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float& sum = sums[2 * i + r][j][c];
          sum = fmaf(scale[j][c / 2], group[r][j][c], sum);
        }
      }
    }
  }
}

template <class S, class Loader>
__device__ __forceinline__ void sum_quantised(unsigned char* shared, const Loader& loader, int steps,
                                              int rows, Sums<S>& sums) {
  const Place<S> at;
#pragma unroll
  for (int s = 0; s < S::kStages - 1; ++s) {
    if (s < steps) {
      loader.copy(shared + s * S::kStageBytes, s);
      loader.keep_scale(shared + s * S::kStageBytes, loader.scale(s));
    }
    cp_async_commit();
  }
  int slot = 0, free = S::kStages - 1;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<S::kStages - 2>();
    __syncthreads();  // the step has arrived, and nobody reads the one before it any more
    const int ahead = step + S::kStages - 1;
    unsigned char* const refill = shared + free * S::kStageBytes;
    bf16 scale{0};
    if (ahead < steps) {
      loader.copy(refill, ahead);
      scale = loader.scale(ahead);
    }
    cp_async_commit();
    sum_group<S>(shared + slot * S::kStageBytes, at, rows, sums);
    if (ahead < steps) loader.keep_scale(refill, scale);
    slot = next_slot<S>(slot);
    free = next_slot<S>(free);
  }
}

// Writes a warp's sums, which lie in shared memory, as rows of outputs; y_row(r): row of y of the tile's row
// r, or -1.
template <class S, typename T, typename YRow>
__device__ __forceinline__ void write_rows(const Output& o, const float* sums, const Place<S>& at,
                                           int first_column, YRow&& y_row) {
  constexpr int kLanes = S::kWarpN / 4, kRows = 32 / kLanes,
                kBatch = S::kWarpM / kRows < 4 ? S::kWarpM / kRows : 4;
  const int column = at.lane % kLanes * 4, to = first_column + at.column + column;
  if (to >= o.columns) return;
  float bias[4];
  quad_bias(o, to, bias);
#pragma unroll 1
  for (int first = at.lane / kLanes; first < S::kWarpM; first += kBatch * kRows) {
    int64_t row[kBatch];
    float residual[kBatch][4];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {  // all loads before the first store
      row[i] = y_row(at.row + first + i * kRows);
      if (o.residual && row[i] >= 0) quad_residual<T>(o, row[i], to, residual[i]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (row[i] < 0) continue;
      const Vec<float, 4> sum = load<4>(sums + (first + i * kRows) * S::kPitch + column);
      float v[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) v[c] = sum.at[c] + bias[c];
      finish_quad<T>(o, row[i], to, v, residual[i]);
    }
  }
}

// The whole tile, with all threads of the block. w, scales: of the group; rows: how many the tile has;
// x_row(r), y_row(r): row of x and of y of the tile's row r, or -1.
template <class S, typename XRow, typename YRow>
__device__ __forceinline__ void run_tile(const Operands& o, const unsigned char* w, const bf16* scales,
                                         int first_column, int rows, XRow&& x_row, YRow&& y_row) {
  MING_DYNAMIC_SHARED(unsigned char, shared);
  Sums<S> sums = {};
  const Loader<S, std::remove_reference_t<XRow>> loader(o, w, scales, first_column, x_row);
  const int steps = int((o.w_row_bytes + S::kWRow - 1) / S::kWRow);
  if constexpr (S::kPlain)
    sum_plain<S>(shared, loader, steps, rows, sums);
  else
    sum_quantised<S>(shared, loader, steps, rows, sums);

  cp_async_wait<0>();
  __syncthreads();  // every warp has read its last stage
  const Place<S> at;
  float* const mine = reinterpret_cast<float*>(shared) + threadIdx.x / 32 * S::kWarpM * S::kPitch;
#pragma unroll
  for (int i = 0; i < S::kMs; ++i) {
#pragma unroll
    for (int j = 0; j < S::kNs; ++j) {
      const float (&f)[4] = sums[i][j];
      if constexpr (S::kPlain) {
        float* const to = mine + (16 * i + at.lane / 4) * S::kPitch + 8 * j + at.lane % 4 * 2;
        store(to, Vec<float, 2>{{f[0], f[1]}});
        store(to + 8 * S::kPitch, Vec<float, 2>{{f[2], f[3]}});
      } else {
        float* const to = mine + (8 * i + at.lane % 4 * 2) * S::kPitch + 16 * j + at.lane / 4;
        to[0] = f[0], to[S::kPitch] = f[1], to[8] = f[2], to[S::kPitch + 8] = f[3];
      }
    }
  }
  __syncwarp();
  if (o.out.dtype == DType::f32)
    write_rows<S, float>(o.out, mine, at, first_column, y_row);
  else
    write_rows<S, bf16>(o.out, mine, at, first_column, y_row);
}

// ---------------------------------------------------------------- choice of the tile

// Large tiles need the fewest bytes per operation, small ones waste the least where rows are few. For each:
// stages that hide the latency of memory within 48 to 72 KB, so that two or three blocks share a
// multiprocessor (A100: 163 KB, 64 K registers).
template <WeightFormat F>
using Large = std::conditional_t<F == WeightFormat::plain, Shape<F, 128, 128, 32, 4, 2, 2, 2>,
                                 Shape<F, 128, 128, 64, 3, 1, 4, 2>>;
template <WeightFormat F>
using Medium = std::conditional_t<F == WeightFormat::plain, Shape<F, 64, 128, 32, 4, 2, 2, 3>,
                                  Shape<F, 64, 128, 64, 3, 1, 4, 3>>;
template <WeightFormat F>
using Small = Shape<F, 32, 64, 64, 6, 1, 4, 3>;

// Calls launch(Shape) with the shape that takes the least time for a product of `rows` by `columns`, or for
// `groups` of them with so many rows on average: rounds of the multiprocessors x size of a tile / share of
// the peak it reaches. Groups of unlike sizes leave half a tile of rows empty.
template <WeightFormat F, typename Launch>
void with_shape(int64_t groups, int64_t rows, int64_t columns, Launch&& launch) {
  const int64_t processors = sm_count();
  const auto time = [&](auto shape, double share) {
    using S = decltype(shape);
    const int64_t halves = groups == 1 ? 2 * ceil_div(rows, S::kM) : ceil_div(2 * rows, S::kM) + 1;
    const int64_t tiles = groups * (halves > 2 ? halves : 2) * ceil_div(columns, S::kN) / 2;
    return double(ceil_div(tiles, processors) * S::kM * S::kN) / share;
  };
  const double small = time(Small<F>{}, 0.5), medium = time(Medium<F>{}, 0.8), large = time(Large<F>{}, 1.0);
  if (large <= medium && large <= small)
    launch(Large<F>{});
  else if (medium <= small)
    launch(Medium<F>{});
  else
    launch(Small<F>{});
}

template <typename Launch>
void with_shape(WeightFormat format, int64_t groups, int64_t rows, int64_t columns, Launch&& launch) {
  if (format == WeightFormat::int8)
    with_shape<WeightFormat::int8>(groups, rows, columns, launch);
  else if (format == WeightFormat::int4)
    with_shape<WeightFormat::int4>(groups, rows, columns, launch);
  else
    with_shape<WeightFormat::plain>(groups, rows, columns, launch);
}

}  // namespace ming::cuda::tile
