#include "ops/moe/moe.h"

#include "binding/packed.h"

namespace ming::binding {
namespace {

void moe_route(py::object x_, py::object routers_, py::object bias_, py::object modality_,
               py::object topk_ids_, py::object topk_weights_, py::object logits_, bool sigmoid,
               bool normalize, int n_group, int topk_group, float scaling) {
  Call call("moe_route");
  TensorView x = call.tensor("x", x_, {DType::f32, DType::bf16}, {"N", "H"});
  TensorView logits = call.dense("logits", logits_, {DType::f32}, {"N", "E"});
  const int64_t experts = logits.shape[1];
  call.expect(experts >= 1 && experts <= kMaxExperts, "expected 1..65535 experts");
  TensorView routers =
      packed_weight(call, "routers", routers_, {DType::f32}, "R", experts, x.shape[1], false);
  call.expect(routers.shape[0] >= 1, "routers: expected at least one");
  TensorView bias;
  if (sigmoid) bias = call.dense("bias", bias_, {DType::f32}, {"R", "E"});
  TensorView modality = call.optional("modality", modality_, {DType::u8}, {"N"});
  TensorView ids = call.dense("topk_ids", topk_ids_, {DType::i32}, {"N", "top_k"});
  TensorView weights = call.dense("topk_weights", topk_weights_, {DType::f32}, {"N", "top_k"});
  if (kReadsValues && modality)
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
  call.run(MING_KERNEL(moe_route), p);
}

void moe_permute(py::object topk_ids_, py::object rows_, py::object offsets_) {
  Call call("moe_permute");
  TensorView ids = call.dense("topk_ids", topk_ids_, {DType::i32}, {"N", "top_k"});
  TensorView rows = call.dense("rows", rows_, {DType::i32}, {"slots"});
  TensorView offsets = call.dense("offsets", offsets_, {DType::i32}, {"E + 1"});
  const int64_t slots = ids.shape[0] * ids.shape[1], experts = offsets.shape[0] - 1;
  call.expect(rows.shape[0] == slots && experts >= 1 && experts <= kMaxExperts && slots < INT32_MAX,
              "expected rows [N * top_k] and offsets [experts + 1]");
  if (kReadsValues) in_range(call, "topk_ids", ids.ptr<int32_t>(), slots, experts);
  MoePermuteParams p{ids.ptr<int32_t>(), rows.ptr<int32_t>(), offsets.ptr<int32_t>(), slots,
                     int32_t(experts)};
  call.run(MING_KERNEL(moe_permute), p);
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
  call.run(MING_KERNEL(moe_combine), p);
}

}  // namespace

void register_moe(py::module_& m) {
  m.def("moe_route", &moe_route);
  m.def("moe_permute", &moe_permute);
  m.def("moe_combine", &moe_combine);
}

}  // namespace ming::binding
