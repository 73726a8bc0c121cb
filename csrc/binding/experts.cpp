#include "binding/packed.h"
#include "ops/moe/moe.h"

namespace ming::binding {
namespace {

GroupedGemmParams grouped_params(Call& call, bool gated, py::object x_, py::object w_, py::object scales_,
                                 int format, py::object rows_, py::object offsets_, int top_k, py::object y_,
                                 py::object workspace_) {
  TensorView x = call.tensor("x", x_, {DType::f32, DType::bf16}, {gated ? "tokens" : "slots", "K"});
  TensorView rows = call.dense("rows", rows_, {DType::i32}, {"slots"});
  TensorView offsets = call.dense("offsets", offsets_, {DType::i32}, {"E + 1"});
  TensorView y = call.tensor("y", y_, {x.dtype}, {"slots", "N"});
  TensorView workspace = call.optional("workspace", workspace_, {DType::u8}, {"bytes"});
  PackedView w =
      packed_weight(call, "experts", w_, scales_, format, {x.dtype}, "E", y.shape[1], x.shape[1], gated);
  const int64_t slots = rows.shape[0], experts = w.data.shape[0];
  call.expect(offsets.shape[0] == experts + 1, "offsets: expected one more than experts");
  call.expect(experts <= kMaxExperts && slots < INT32_MAX,
              "expected at most 65535 experts and fewer than 2^31 rows");
  call.expect(!gated || (top_k >= 1 && x.shape[0] * top_k == slots), "rows: expected tokens * top_k of them");
  if (kReadsValues) {
    in_range(call, "rows", rows.ptr<int32_t>(), slots, slots);
    const int32_t* offset = offsets.ptr<int32_t>();
    bool ascending = offset[0] == 0 && offset[experts] == slots;
    for (int64_t e = 0; e < experts; ++e) ascending &= offset[e] <= offset[e + 1];
    call.expect(ascending, "offsets: expected ascending values from 0 to the number of rows");
  }
  GroupedGemmParams p{};
  p.x = x.data;
  p.w = w.data.data;
  p.rows = rows.ptr<int32_t>();
  p.offsets = offsets.ptr<int32_t>();
  p.y = y.data;
  p.slots = slots;
  p.n = y.shape[1];
  p.k = x.shape[1];
  p.x_stride = x.stride[0];
  p.y_stride = y.stride[0];
  p.experts = int32_t(experts);
  p.top_k = top_k;
  p.dtype = x.dtype;
  p.scales = w.scales.data;
  p.format = w.format;
  p.workspace = workspace.data;
  p.workspace_bytes = workspace ? workspace.shape[0] : 0;
  return p;
}

#if MING_BACKEND_CUDA
struct WorkspaceQuery {
  GroupedGemmParams product;
  bool gated, always;
  int64_t* bytes;
};
// On the tensors' device.
void workspace_of(const WorkspaceQuery& q, Stream) {
  *q.bytes = cuda::grouped_gemm_workspace(q.product, q.gated, q.always);
}
#endif

}  // namespace

void register_experts(py::module_& m) {
  m.def("grouped_gemm_swiglu", [](py::object x, py::object w, py::object scales, int format, py::object rows,
                                  py::object offsets, int top_k, py::object y, py::object workspace) {
    Call call("grouped_gemm_swiglu");
    call.run(MING_KERNEL(grouped_gemm_swiglu),
             grouped_params(call, true, x, w, scales, format, rows, offsets, top_k, y, workspace));
  });
  m.def("grouped_gemm_down", [](py::object x, py::object w, py::object scales, int format, py::object rows,
                                py::object offsets, int top_k, py::object y, py::object workspace) {
    Call call("grouped_gemm_down");
    call.run(MING_KERNEL(grouped_gemm_down),
             grouped_params(call, false, x, w, scales, format, rows, offsets, top_k, y, workspace));
  });
#if MING_BACKEND_CUDA
  m.def("grouped_gemm_workspace",
        [](bool gated, py::object x, py::object w, py::object scales, int format, py::object rows,
           py::object offsets, int top_k, py::object y, bool always) {
          Call call(gated ? "grouped_gemm_swiglu" : "grouped_gemm_down");
          int64_t bytes = 0;
          call.run(&workspace_of, WorkspaceQuery{grouped_params(call, gated, x, w, scales, format, rows,
                                                                offsets, top_k, y, py::none()),
                                                 gated, always, &bytes});
          return bytes;
        });
#endif
}

}  // namespace ming::binding
