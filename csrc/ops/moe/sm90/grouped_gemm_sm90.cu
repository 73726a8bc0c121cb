#include "ops/moe/sm90/grouped_gemm_sm90.h"

// The umbrella headers (collective_builder.hpp, gemm_universal.hpp) reach the kernels of every architecture,
// half as many headers again to vendor.
// clang-format off: each of these needs what the one before declares
#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/collective_mma_decl.hpp>
#include <cutlass/gemm/collective/sm90_mma_array_tma_gmma_ss_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder_decl.hpp>
#include <cutlass/gemm/collective/builders/sm90_gmma_builder.inl>
#include <cutlass/gemm/kernel/sm90_gemm_array_tma_warpspecialized_cooperative.hpp>
#include <cutlass/gemm/kernel/sm90_gemm_array_tma_warpspecialized_pingpong.hpp>
#include <cutlass/device_kernel.h>
// clang-format on

#include <stdexcept>

#include "common/device.h"
#include "common/gpu.h"
#include "ops/moe/sm90/epilogue.cuh"
#include "ops/moe/sm90/tiles.h"

namespace ming::cuda {
namespace sm90 {

using Element = cutlass::bfloat16_t;
using Shape = cute::Shape<int, int, int>;  // rows, outputs, k of one expert
using ProblemShape = cutlass::gemm::GroupProblemShape<Shape>;
constexpr int kAlignment = 8;  // elements in 16 bytes

template <class Tile, bool Gated>
struct Kernel {
  using Epilogue = CollectiveEpilogue<Gated>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor*, kAlignment,
      Element, cutlass::layout::ColumnMajor*, kAlignment, float, typename Tile::Shape,
      cute::Shape<cute::_1, cute::_1, cute::_1>, cutlass::gemm::collective::StageCount<Tile::kStages>,
      typename Tile::Schedule>::CollectiveOp;
  using Gemm = cutlass::gemm::kernel::GemmUniversal<ProblemShape, Mainloop, Epilogue>;
  static_assert(Gemm::SharedStorageSize <= 227 << 10);
};

// Both operands are K-major: one run-time stride each, of one type.
using Stride = cute::Stride<int64_t, cute::Int<1>, cute::Int<0>>;

// What the kernel reads per expert, one array each.
struct Groups {
  Shape* shapes;
  const Element** x;
  const Element** w;
  Stride* x_strides;
  Stride* w_strides;
};

// The workspace cut into parts of 256-byte alignment; `bytes` counts what was taken.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}
  template <typename T>
  T* take(int64_t count) {
    T* const part = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + bytes);
    bytes += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return part;
  }
  int64_t bytes = 0;

 private:
  unsigned char* memory_;
};

struct Parts {
  Groups groups;
  bf16* gathered;  // [slots, k] in grouped order; of a gated product only
  unsigned char* tensor_maps;
};

Parts divide(Workspace& workspace, const GroupedGemmParams& p, bool gated) {
  Parts parts{};
  parts.groups.shapes = workspace.take<Shape>(p.experts);
  parts.groups.x = workspace.take<const Element*>(p.experts);
  parts.groups.w = workspace.take<const Element*>(p.experts);
  parts.groups.x_strides = workspace.take<Stride>(p.experts);
  parts.groups.w_strides = workspace.take<Stride>(p.experts);
  // Two maps per block of the persistent grid, which has one block per multiprocessor.
  parts.tensor_maps = workspace.take<unsigned char>(2 * sizeof(cute::TmaDescriptor) * sm_count());
  if (gated) parts.gathered = workspace.take<bf16>(p.slots * p.k);
  return parts;
}

__global__ void fill_groups(Groups groups, const bf16* x, const bf16* w, const int32_t* offsets,
                            int64_t slots, int experts, int outputs, int k, int64_t x_stride,
                            int64_t w_stride, DeviceStatus* status) {
  const int e = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (e >= experts) return;
  if (e == 0 && offsets[0] != 0) gpu::report(status, Fault::offsets, offsets[0]);
  if (e == 0 && offsets[experts] != slots) gpu::report(status, Fault::offsets, offsets[experts]);
  const Rows mine = expert_rows(offsets, e, slots, status);
  groups.shapes[e] = Shape{mine.count, outputs, k};
  groups.x[e] = reinterpret_cast<const Element*>(x + mine.begin * x_stride);
  groups.w[e] = reinterpret_cast<const Element*>(w + e * int64_t(outputs) * w_stride);
  groups.x_strides[e] = Stride{x_stride, {}, {}};
  groups.w_strides[e] = Stride{w_stride, {}, {}};
}

constexpr int kGatherRows = 8;  // per block, one warp each

// to[i] = x[rows[i] / top_k]; places that name no slot get zeros, and the epilogue leaves their results out.
__global__ void __launch_bounds__(32 * kGatherRows)
    gather_rows(bf16* to, const bf16* x, const int32_t* rows, const int32_t* offsets, int64_t slots,
                int experts, int top_k, int k, int64_t x_stride) {
  const int64_t place = int64_t(blockIdx.x) * kGatherRows + threadIdx.x / 32;
  if (place >= slots || place >= offsets[experts]) return;
  const int slot = rows[place];
  const bool valid = slot >= 0 && slot < slots;
  const bf16* from = x + (valid ? slot / top_k : 0) * x_stride;
  for (int i = int(threadIdx.x % 32) * kAlignment; i < k; i += 32 * kAlignment) {
    const uint4 zero = make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(to + place * k + i) = valid ? *reinterpret_cast<const uint4*>(from + i) : zero;
  }
}

template <class Tile, bool Gated>
void launch(const GroupedGemmParams& p, const Parts& parts, Stream stream) {
  using Gemm = typename Kernel<Tile, Gated>::Gemm;
  typename Gemm::Arguments args{};
  args.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
  args.problem_shape = {p.experts, parts.groups.shapes, nullptr};
  args.mainloop = {parts.groups.x, parts.groups.x_strides, parts.groups.w, parts.groups.w_strides};
  args.epilogue = {p.rows,     p.offsets, static_cast<bf16*>(p.y), p.slots,
                   p.y_stride, int(p.n),  device_status()};
  args.hw_info.sm_count = sm_count();
  if (Gemm::get_workspace_size(args) > 2 * sizeof(cute::TmaDescriptor) * args.hw_info.sm_count)
    throw std::runtime_error("grouped_gemm_sm90: the kernel asks for more workspace than tensor maps");
  const typename Gemm::Params params = Gemm::to_underlying_arguments(args, parts.tensor_maps);
  MING_LAUNCH((cutlass::device_kernel<Gemm>), Gemm::get_grid_shape(params), Gemm::get_block_shape(),
              Gemm::SharedStorageSize, stream, params);
}

template <bool Gated>
void run(const GroupedGemmParams& p, Stream stream) {
  Workspace workspace(p.workspace);
  const Parts parts = divide(workspace, p, Gated);
  if (p.workspace == nullptr || p.workspace_bytes < workspace.bytes)
    throw std::runtime_error("grouped_gemm_sm90: workspace too small");
  const bf16* x = static_cast<const bf16*>(p.x);
  int64_t x_stride = p.x_stride;
  const int outputs = int(row_count(p.n, Gated));
  DeviceStatus* const status = device_status();
  if (Gated) {
    MING_LAUNCH(gather_rows, uint32_t(gpu::ceil_div(p.slots, kGatherRows)), 32 * kGatherRows, 0, stream,
                parts.gathered, x, p.rows, p.offsets, p.slots, p.experts, p.top_k, int(p.k), x_stride);
    x = parts.gathered;
    x_stride = p.k;
  }
  MING_LAUNCH(fill_groups, uint32_t(gpu::ceil_div(p.experts, 128)), 128, 0, stream, parts.groups, x,
              static_cast<const bf16*>(p.w), p.offsets, p.slots, p.experts, outputs, int(p.k), x_stride, p.k,
              status);
  if (tall_tiles(p.slots, p.experts))
    launch<TallTile, Gated>(p, parts, stream);
  else
    launch<FlatTile, Gated>(p, parts, stream);
}

}  // namespace sm90

bool grouped_gemm_sm90_usable(const GroupedGemmParams& p, bool) {
  return p.dtype == DType::bf16 && p.format == WeightFormat::plain && p.k % sm90::kAlignment == 0 &&
         p.n % sm90::kAlignment == 0 && gpu::wide_rows<bf16>(p.x, p.x_stride) &&
         gpu::wide_rows<bf16>(p.y, p.y_stride) && gpu::wide_rows<bf16>(p.w, p.k) && p.slots > 0 &&
         p.slots <= INT32_MAX && capability() == 90;
}

size_t grouped_gemm_sm90_workspace(const GroupedGemmParams& p, bool gated) {
  sm90::Workspace workspace(nullptr);
  sm90::divide(workspace, p, gated);
  return size_t(workspace.bytes);
}

void grouped_gemm_sm90(const GroupedGemmParams& p, bool gated, Stream stream) {
  gated ? sm90::run<true>(p, stream) : sm90::run<false>(p, stream);
}

}  // namespace ming::cuda
