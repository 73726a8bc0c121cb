#include "ops/gemm/gemm.h"

#include "binding/check.h"

namespace ming::binding {
namespace {

constexpr int64_t kMaxDim = int64_t(1) << 40;  // keeps the products of sizes below far from overflow

// A packed weight as gemm.h defines it.
TensorView packed(Call& call, const char* name, py::object object, std::initializer_list<DType> dtypes,
                  int64_t n, int64_t k, bool gated) {
  call.expect(n > 0 && k > 0 && n < kMaxDim && k < kMaxDim, "expected positive n and k");
  TensorView w = call.dense(name, object, dtypes, {"packed elements"});
  const int64_t elements = panel_count(n, gated) * panel_size(w.dtype, k);
  call.expect(w.shape[0] == elements, std::string(name) + ": expected " + std::to_string(elements) +
                                          " packed elements for n = " + std::to_string(n) + ", k = " +
                                          std::to_string(k) + ", got " + std::to_string(w.shape[0]));
  call.expect(reinterpret_cast<uintptr_t>(w.data) % 64 == 0,
              std::string(name) + ": expected 64-byte alignment");
  return w;
}

void linear(py::object x_, py::object w_, int64_t n, bool gated, py::object bias_, int act,
            py::object residual_, py::object y_) {
  Call call("linear");
  call.expect(act >= 0 && act <= int(Act::relu) && !(gated && (act || !residual_.is_none())),
              "expected an activation of 0..3, and none and no residual with a gated weight");
  TensorView x = call.tensor("x", x_, {DType::f32, DType::bf16}, {"M", "K"});
  call.bind("N", n);
  TensorView w = packed(call, "w", w_, {x.dtype}, n, x.shape[1], gated);
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
  TensorView out = packed(call, "packed", packed_, {DType::f32, DType::bf16}, n, k, gated);
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
