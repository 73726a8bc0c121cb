#include "ops/norm/norm.h"

#include "binding/check.h"

namespace ming::binding {
namespace {

void rms_norm(py::object x_, py::object weight_, py::object y_, py::object residual_, py::object sum_,
              float eps, bool weight_in_fp32) {
  Call call("rms_norm");
  TensorView x = call.tensor("x", x_, {DType::f32, DType::bf16}, {"N", "D"});
  TensorView weight = call.tensor("weight", weight_, {x.dtype}, {"D"});
  TensorView y = call.tensor("y", y_, {x.dtype}, {"N", "D"});
  TensorView residual = call.optional("residual", residual_, {x.dtype}, {"N", "D"});
  TensorView sum = call.optional("sum", sum_, {x.dtype}, {"N", "D"});
  call.expect(bool(residual) == bool(sum), "residual and sum are given together");
  RmsNormParams p{x.data,         residual.data, weight.data,        y.data,      sum.data,      x.shape[0],
                  x.shape[1],     x.stride[0],   residual.stride[0], y.stride[0], sum.stride[0], eps,
                  weight_in_fp32, x.dtype};
  call.run(MING_KERNEL(rms_norm), p);
}

void layer_norm(py::object x_, py::object weight_, py::object bias_, py::object y_, float eps) {
  Call call("layer_norm");
  TensorView x = call.tensor("x", x_, {DType::f32, DType::bf16}, {"N", "D"});
  TensorView weight = call.tensor("weight", weight_, {x.dtype}, {"D"});
  TensorView bias = call.tensor("bias", bias_, {x.dtype}, {"D"});
  TensorView y = call.tensor("y", y_, {x.dtype}, {"N", "D"});
  LayerNormParams p{x.data,     weight.data, bias.data,   y.data, x.shape[0],
                    x.shape[1], x.stride[0], y.stride[0], eps,    x.dtype};
  call.run(MING_KERNEL(layer_norm), p);
}

}  // namespace

void register_norm(py::module_& m) {
  m.def("rms_norm", &rms_norm);
  m.def("layer_norm", &layer_norm);
}

}  // namespace ming::binding
