#include "ops/gemm/gemm.h"

#include "binding/packed.h"

namespace ming::binding {

TensorView packed_weight(Call& call, const char* name, py::handle object, std::initializer_list<DType> dtypes,
                         const char* count, int64_t n, int64_t k, bool gated) {
  constexpr int64_t kMaxDim = int64_t(1) << 30;  // n * k and its padding stay far from overflow
  const std::string label(name);
  call.expect(n > 0 && k > 0 && n <= kMaxDim && k <= kMaxDim,
              label + ": expected 1 to 2^30 outputs and inputs, got n = " + std::to_string(n) +
                  ", k = " + std::to_string(k));
  TensorView w = count ? call.dense(name, object, dtypes, {count, "packed elements"})
                       : call.dense(name, object, dtypes, {"packed elements"});
  const int64_t elements = panel_count(n, gated) * panel_size(w.dtype, k), got = w.shape[w.ndim - 1];
  call.expect(got == elements, label + ": expected " + std::to_string(elements) +
                                   " packed elements for n = " + std::to_string(n) +
                                   ", k = " + std::to_string(k) + ", got " + std::to_string(got));
  call.expect(reinterpret_cast<uintptr_t>(w.data) % 64 == 0, label + ": expected 64-byte alignment");
  return w;
}

namespace {

void linear(py::object x_, py::object w_, int64_t n, bool gated, py::object bias_, int act,
            py::object residual_, py::object y_) {
  Call call("linear");
  call.expect(act >= 0 && act <= int(Act::relu) && !(gated && (act || !residual_.is_none())),
              "expected an activation of 0..3, and none and no residual with a gated weight");
  TensorView x = call.tensor("x", x_, {DType::f32, DType::bf16}, {"M", "K"});
  call.bind("N", n);
  TensorView w = packed_weight(call, "w", w_, {x.dtype}, nullptr, n, x.shape[1], gated);
  call.bind("outputs of bias", gated ? 2 * n : n);
  TensorView bias = call.optional("bias", bias_, {x.dtype}, {"outputs of bias"});
  TensorView y = call.tensor("y", y_, {DType::f32, DType::bf16}, {"M", "N"});
  TensorView residual = call.optional("residual", residual_, {y.dtype}, {"M", "N"});
  LinearParams p{x.data,      w.data,  bias.data,  residual.data, y.data,
                 x.shape[0],  n,       x.shape[1], x.stride[0],   residual.stride[0],
                 y.stride[0], x.dtype, y.dtype,    Act(act),      gated};
  py::gil_scoped_release release;
  cpu::linear(p);
}

void pack_weight(py::object first_, py::object second_, py::object packed_) {
  Call call("pack_weight");
  const auto sources = {DType::f32, DType::bf16, DType::f16};
  TensorView first = call.tensor("weight", first_, sources, {"N", "K"});
  TensorView second = call.optional("up", second_, {first.dtype}, {"N", "K"});
  const int64_t n = first.shape[0], k = first.shape[1];
  const bool gated = bool(second);
  TensorView out = packed_weight(call, "packed", packed_, {DType::f32, DType::bf16}, nullptr, n, k, gated);
  PackParams p{{first.data, second.data},
               {first.stride[0], second.stride[0]},
               out.data,
               n,
               k,
               first.dtype,
               out.dtype,
               gated};
  py::gil_scoped_release release;
  cpu::pack_weight(p);
}

}  // namespace

void register_gemm(py::module_& m) {
  m.def("linear", &linear);
  m.def("pack_weight", &pack_weight);
}

}  // namespace ming::binding
