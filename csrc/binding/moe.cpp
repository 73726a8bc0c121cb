#include "ops/moe/moe.h"

#include "binding/packed.h"

namespace ming::binding {
namespace {

constexpr int kMaxExperts = 65536;

void in_range(Call& call, const char* name, const int32_t* values, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < 0 || values[i] >= limit)
      call.fail(std::string(name) + ": expected values in 0.." + std::to_string(limit - 1) + ", got " +
                std::to_string(values[i]));
}

void moe_route(py::object x_, py::object routers_, py::object bias_, py::object modality_,
               py::object topk_ids_, py::object topk_weights_, py::object logits_, bool sigmoid,
               bool normalize, int n_group, int topk_group, float scaling) {
  Call call("moe_route");
  TensorView x = call.tensor("x", x_, {DType::f32, DType::bf16}, {"N", "H"});
  TensorView logits = call.dense("logits", logits_, {DType::f32}, {"N", "E"});
  const int64_t experts = logits.shape[1];
  call.expect(experts >= 1 && experts <= kMaxExperts, "expected 1..65536 experts");
  TensorView routers =
      packed_weight(call, "routers", routers_, {DType::f32}, "R", experts, x.shape[1], false);
  call.expect(routers.shape[0] >= 1, "routers: expected at least one");
  TensorView bias;
  if (sigmoid) bias = call.dense("bias", bias_, {DType::f32}, {"R", "E"});
  TensorView modality = call.optional("modality", modality_, {DType::u8}, {"N"});
  TensorView ids = call.dense("topk_ids", topk_ids_, {DType::i32}, {"N", "top_k"});
  TensorView weights = call.dense("topk_weights", topk_weights_, {DType::f32}, {"N", "top_k"});
  if (modality)
    for (int64_t t = 0; t < modality.shape[0]; ++t)
      call.expect(
          modality.ptr<uint8_t>()[t] < routers.shape[0],
          "modality: expected values below the number of routers, " + std::to_string(routers.shape[0]));
  const int64_t top_k = ids.shape[1];
  call.expect(top_k >= 1 && top_k <= kMaxRouted && top_k <= experts,
              "expected top_k in 1..min(experts, 256)");
  if (sigmoid) {
    call.expect(n_group >= 1 && n_group <= kMaxRouted && experts % n_group == 0 && experts / n_group >= 2,
                "expected n_group to divide the experts into at most 256 groups of two or more");
    call.expect(topk_group >= 1 && topk_group <= n_group && experts / n_group * topk_group >= top_k,
                "expected topk_group in 1..n_group and at least top_k experts in the kept groups");
  }
  MoeRouteParams p{};
  p.x = x.data;
  p.routers = routers.ptr<float>();
  p.bias = bias.ptr<float>();
  p.modality = modality.ptr<uint8_t>();
  p.topk_ids = ids.ptr<int32_t>();
  p.topk_weights = weights.ptr<float>();
  p.logits = logits.ptr<float>();
  p.tokens = x.shape[0];
  p.hidden = x.shape[1];
  p.x_stride = x.stride[0];
  p.experts = int32_t(experts);
  p.routers_count = int32_t(routers.shape[0]);
  p.top_k = int32_t(top_k);
  p.n_group = n_group;
  p.topk_group = topk_group;
  p.scaling = scaling;
  p.dtype = x.dtype;
  p.kind = sigmoid ? RouterKind::grouped_sigmoid : RouterKind::softmax;
  p.normalize = normalize;
  py::gil_scoped_release release;
  cpu::moe_route(p);
}

void moe_permute(py::object topk_ids_, py::object rows_, py::object offsets_) {
  Call call("moe_permute");
  TensorView ids = call.dense("topk_ids", topk_ids_, {DType::i32}, {"N", "top_k"});
  TensorView rows = call.dense("rows", rows_, {DType::i32}, {"slots"});
  TensorView offsets = call.dense("offsets", offsets_, {DType::i32}, {"E + 1"});
  const int64_t slots = ids.shape[0] * ids.shape[1], experts = offsets.shape[0] - 1;
  call.expect(rows.shape[0] == slots && experts >= 1 && experts <= kMaxExperts && slots < INT32_MAX,
              "expected rows [N * top_k] and offsets [experts + 1]");
  in_range(call, "topk_ids", ids.ptr<int32_t>(), slots, experts);
  MoePermuteParams p{ids.ptr<int32_t>(), rows.ptr<int32_t>(), offsets.ptr<int32_t>(), slots,
                     int32_t(experts)};
  py::gil_scoped_release release;
  cpu::moe_permute(p);
}

void grouped_gemm(const char* op, bool gated, py::object x_, py::object w_, py::object scales_, int format,
                  py::object rows_, py::object offsets_, int top_k, py::object y_, py::object workspace_) {
  Call call(op);
  TensorView x = call.tensor("x", x_, {DType::f32, DType::bf16}, {gated ? "tokens" : "slots", "K"});
  TensorView rows = call.dense("rows", rows_, {DType::i32}, {"slots"});
  TensorView offsets = call.dense("offsets", offsets_, {DType::i32}, {"E + 1"});
  TensorView y = call.tensor("y", y_, {x.dtype}, {"slots", "N"});
  TensorView workspace = call.optional("workspace", workspace_, {DType::u8}, {"bytes"});
  PackedView w =
      packed_weight(call, "experts", w_, scales_, format, {x.dtype}, "E", y.shape[1], x.shape[1], gated);
  const int64_t slots = rows.shape[0], experts = w.data.shape[0];
  call.expect(offsets.shape[0] == experts + 1, "offsets: expected one more than experts");
  call.expect(experts <= kMaxExperts && slots < INT32_MAX, "expected at most 65536 experts, 2^31 rows");
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
  gated ? call.run(MING_KERNEL(grouped_gemm_swiglu), p) : call.run(MING_KERNEL(grouped_gemm_down), p);
}

void moe_combine(py::object expert_out_, py::object topk_weights_, py::object shared_, py::object y_) {
  Call call("moe_combine");
  TensorView in = call.dense("expert_out", expert_out_, {DType::f32, DType::bf16}, {"slots", "H"});
  TensorView weights = call.dense("topk_weights", topk_weights_, {DType::f32}, {"N", "top_k"});
  TensorView shared = call.optional("shared", shared_, {in.dtype}, {"N", "H"});
  TensorView y = call.dense("y", y_, {in.dtype}, {"N", "H"});
  call.expect(in.shape[0] == weights.shape[0] * weights.shape[1], "expert_out: expected N * top_k rows");
  call.expect(weights.shape[1] >= 1 && in.shape[1] >= 1, "expected positive top_k and H");
  MoeCombineParams p{in.data,          weights.ptr<float>(),      shared.data, y.data, y.shape[0], y.shape[1],
                     shared.stride[0], int32_t(weights.shape[1]), in.dtype};
  py::gil_scoped_release release;
  cpu::moe_combine(p);
}

}  // namespace

void register_moe(py::module_& m) {
  m.def("moe_route", &moe_route);
  m.def("moe_permute", &moe_permute);
  m.def("grouped_gemm_swiglu", [](py::object x, py::object w, py::object scales, int format, py::object rows,
                                  py::object offsets, int top_k, py::object y, py::object workspace) {
    grouped_gemm("grouped_gemm_swiglu", true, x, w, scales, format, rows, offsets, top_k, y, workspace);
  });
  m.def("grouped_gemm_down", [](py::object x, py::object w, py::object scales, int format, py::object rows,
                                py::object offsets, py::object y, py::object workspace) {
    grouped_gemm("grouped_gemm_down", false, x, w, scales, format, rows, offsets, 1, y, workspace);
  });
  m.def("moe_combine", &moe_combine);
}

}  // namespace ming::binding
