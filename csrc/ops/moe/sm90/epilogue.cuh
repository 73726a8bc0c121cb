// Epilogue of the grouped products: from wgmma's registers straight to the rows of y.
//
// A thread of a warpgroup holds, of an m64nN tile, two rows h = 0, 1 (eight apart) and of each group j of
// eight columns the two neighbours 8j + 2q, 8j + 2q + 1, q = lane % 4. So a gate and its up (rows 2i, 2i + 1
// of the weight) meet in one thread. The four lanes of a row then exchange words until each holds 16
// consecutive bytes of it, and a row's stores fill whole 32-byte sectors.
#pragma once

#include <cutlass/numeric_types.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/epilogue/dispatch_policy.hpp>

#include "common/device_status.h"
#include "common/gpu.h"

namespace ming::cuda::sm90 {

// The rows of expert e in grouped order; none where `offsets` make no sense.
struct Rows {
  int32_t begin, count;
};

__device__ inline Rows expert_rows(const int32_t* offsets, int e, int64_t slots, DeviceStatus* status) {
  const int64_t begin = offsets[e], end = offsets[e + 1];
  if (begin < 0 || end < begin || end > slots) {
    gpu::report(status, Fault::offsets, end);
    return {0, 0};
  }
  return {int32_t(begin), int32_t(end - begin)};
}

// 4x4 words across the four lanes of a quad: lane q's word t becomes lane t's word q.
__device__ inline void transpose_quad(uint32_t (&w)[4], int q) {
  const bool odd = q & 1, upper = q & 2;
#pragma unroll
  for (int t = 0; t < 4; t += 2) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? w[t] : w[t + 1], 1);
    (odd ? w[t] : w[t + 1]) = got;
  }
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? w[t] : w[t + 2], 2);
    (upper ? w[t] : w[t + 2]) = got;
  }
}

__device__ inline float swiglu(float gate, float up) {
  return __fdividef(gate, 1.0f + __expf(-gate)) * up;  // a few ulp of fp32, far below the rounding to bf16
}

// Callable epilogue in the form CUTLASS' Sm90TmaWarpSpecializedAdapter expects.
template <bool Gated>
struct RowEpilogue {
  using DispatchPolicy = cutlass::epilogue::PtrArrayNoSmemWarpSpecialized;
  using ElementC = cutlass::bfloat16_t;
  using ElementD = cutlass::bfloat16_t;
  using InternalStrideC = cute::Stride<int64_t, cute::Int<1>, cute::Int<0>>;
  using InternalStrideD = InternalStrideC;
  using StrideC = InternalStrideC*;
  using StrideD = InternalStrideD*;

  struct SharedStorage {};

  struct Arguments {
    const int32_t* rows;     // [slots]
    const int32_t* offsets;  // [experts + 1]
    bf16* y;                 // [slots, n], row stride y_stride
    int64_t slots, y_stride;
    int32_t n;  // columns of y
    DeviceStatus* status;
  };
  using Params = Arguments;

  template <class Shape>
  static Params to_underlying_arguments(const Shape&, const Arguments& args, void*) {
    return args;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&, int) {
    return 0;
  }

  __host__ __device__ explicit RowEpilogue(const Params& params_) : params(params_) {}

  template <class Shape, class Block, class Coord, class Engine, class Layout, class Mma, class Residue>
  __device__ void operator()(const Shape& problem, const Block& block, const Coord& coord,
                             const cute::Tensor<Engine, Layout>& sums, const Mma& mma, const Residue&,
                             int thread, char*) {
    using namespace cute;
    // ((column pair, row half, groups of 8 columns), tiles along M, tiles along N)
    constexpr int kGroups = size<0, 2>(Layout{});
    static_assert(is_same_v<typename Mma::AtomLayoutC_TV, SM90::GMMA::CLayout_64xN<8 * kGroups>>);
    static_assert(size<0, 0>(Layout{}) == 2 && size<0, 1>(Layout{}) == 2);
    constexpr int kStep = Gated ? 8 : 4;  // groups behind one 16-byte store
    static_assert(kGroups % kStep == 0);

    const auto [tile_m, tile_n, tile_k, expert] = coord;
    const int count = get<0>(problem);
    const auto whole = make_identity_tensor(make_shape(count, get<1>(problem)));
    const auto tile = local_tile(whole, take<0, 2>(block), make_coord(tile_m, tile_n));
    const auto mine = mma.get_thread_slice(thread).partition_C(tile);  // where each sum belongs
    const int32_t begin = expert_rows(params.offsets, expert, params.slots, params.status).begin;
    const int q = thread % 4;

    CUTLASS_PRAGMA_UNROLL
    for (int m = 0; m < size<1>(sums); ++m) {
      CUTLASS_PRAGMA_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = get<0>(mine(make_coord(0, h, 0), m, 0));
        bf16* y = row < count ? destination(begin + row) : nullptr;
        CUTLASS_PRAGMA_UNROLL
        for (int n = 0; n < size<2>(sums); ++n) {
          CUTLASS_PRAGMA_UNROLL
          for (int j = 0; j < kGroups; j += kStep) {
            const auto at = [&](int pair, int group) { return sums(make_coord(pair, h, j + group), m, n); };
            uint32_t w[4];
            CUTLASS_PRAGMA_UNROLL
            for (int t = 0; t < 4; ++t) {
              if constexpr (Gated)
                w[t] = gpu::pack_bf16(swiglu(at(0, 2 * t), at(1, 2 * t)),
                                      swiglu(at(0, 2 * t + 1), at(1, 2 * t + 1)));
              else
                w[t] = gpu::pack_bf16(at(0, t), at(1, t));
            }
            transpose_quad(w, q);
            // The first product column of group j, thus of the lanes' common stretch of 32 results.
            const int first = get<1>(mine(make_coord(0, h, j), m, n)) - 2 * q;
            const int column = (Gated ? first / 2 : first) + 8 * q;
            if (y != nullptr && column < params.n) {
              uint4 out = make_uint4(w[0], w[1], w[2], w[3]);
              if constexpr (Gated) {  // low halves come from group 2q, high halves from group 2q + 1
                out = make_uint4(__byte_perm(w[0], w[1], 0x5410), __byte_perm(w[2], w[3], 0x5410),
                                 __byte_perm(w[0], w[1], 0x7632), __byte_perm(w[2], w[3], 0x7632));
              }
              *reinterpret_cast<uint4*>(y + column) = out;
            }
          }
        }
      }
    }
  }

 private:
  // The row of y for one place of the grouped order; none where `rows` names no slot.
  __device__ bf16* destination(int32_t place) const {
    const int32_t slot = params.rows[place];
    if (slot < 0 || slot >= params.slots) {
      gpu::report(params.status, Fault::rows, slot);
      return nullptr;
    }
    return params.y + (Gated ? place : slot) * params.y_stride;
  }

  Params params;
};

template <bool Gated>
using CollectiveEpilogue =
    cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<RowEpilogue<Gated>>;

}  // namespace ming::cuda::sm90
