#include "ops/gemm/gemm.h"

#include <functional>

#include "binding/packed.h"

namespace ming::binding {

namespace {

// Elements of one packed weight in the layout of this module's devices.
int64_t packed_elements(DType dtype, WeightFormat format, int64_t n, int64_t k, bool gated) {
#if MING_BACKEND_CUDA
  const int64_t bytes = row_count(n, gated) * row_bytes(dtype, format, k);
  return format != WeightFormat::plain ? bytes : bytes / (dtype == DType::bf16 ? 2 : 4);
#else
  (void)format;
  return panel_count(n, gated) * panel_size(dtype, k);
#endif
}

// `what` [elements], or [count, elements] where `count` names a dimension.
TensorView sized(Call& call, const std::string& label, const char* what, py::handle object,
                 std::initializer_list<DType> dtypes, const char* count, int64_t n, int64_t k,
                 const std::function<int64_t(DType)>& elements) {
  TensorView t = count ? call.dense(label.c_str(), object, dtypes, {count, what})
                       : call.dense(label.c_str(), object, dtypes, {what});
  const int64_t wanted = elements(t.dtype), got = t.shape[t.ndim - 1];
  call.expect(got == wanted, label + ": expected " + std::to_string(wanted) + " " + what +
                                 " for n = " + std::to_string(n) + ", k = " + std::to_string(k) + ", got " +
                                 std::to_string(got));
  return t;
}

}  // namespace

PackedView packed_weight(Call& call, const char* name, py::handle object, py::handle scales, int format,
                         std::initializer_list<DType> dtypes, const char* count, int64_t n, int64_t k,
                         bool gated) {
  constexpr int64_t kMaxDim = int64_t(1) << 30;  // n * k and its padding stay far from overflow
  const std::string label(name);
  call.expect(n > 0 && k > 0 && n <= kMaxDim && k <= kMaxDim,
              label + ": expected 1 to 2^30 outputs and inputs, got n = " + std::to_string(n) +
                  ", k = " + std::to_string(k));
  call.expect(format >= 0 && format <= (MING_BACKEND_CUDA ? int(WeightFormat::int4) : 0),
              label + ": expected a weight format of these kernels");
  PackedView w{{}, {}, WeightFormat(format)};
  const bool plain = w.format == WeightFormat::plain;
  call.expect(plain == scales.is_none(), label + ": expected scales with quantised weights and only there");
  if (plain)
    w.data = sized(call, label, "packed elements", object, dtypes, count, n, k,
                   [&](DType dtype) { return packed_elements(dtype, w.format, n, k, gated); });
  else {
    w.data = sized(call, label, "packed bytes", object, {DType::u8}, count, n, k,
                   [&](DType dtype) { return packed_elements(dtype, w.format, n, k, gated); });
    w.scales = sized(call, label + " scales", "scales", scales, {DType::bf16}, count, n, k,
                     [&](DType) { return row_count(n, gated) * row_scales(k); });
  }
  // Weights of a stack follow each other without gaps: rows are multiples of 16 bytes, panels of 64.
  constexpr int kAlignment = MING_BACKEND_CUDA ? 16 : 64;
  call.expect(reinterpret_cast<uintptr_t>(w.data.data) % kAlignment == 0,
              label + ": expected " + std::to_string(kAlignment) + "-byte alignment");
  return w;
}

TensorView packed_weight(Call& call, const char* name, py::handle object, std::initializer_list<DType> dtypes,
                         const char* count, int64_t n, int64_t k, bool gated) {
  return packed_weight(call, name, object, py::none(), 0, dtypes, count, n, k, gated).data;
}

namespace {

constexpr const char* kActs = "expected an activation of 0..3, and none and no residual with a gated weight";

// Everything but x and w of a product with outputs y [M, N].
LinearParams outputs(Call& call, DType dtype, bool gated, py::object bias_, int act, py::object residual_,
                     py::object y_) {
  call.expect(act >= 0 && act <= int(Act::relu) && !(gated && (act || !residual_.is_none())), kActs);
  TensorView y = call.tensor("y", y_, {DType::f32, DType::bf16}, {"M", "N"});
  call.bind("outputs of bias", row_count(y.shape[1], gated));
  TensorView bias = call.optional("bias", bias_, {dtype}, {"outputs of bias"});
  TensorView residual = call.optional("residual", residual_, {y.dtype}, {"M", "N"});
  LinearParams p{};
  p.bias = bias.data;
  p.residual = residual.data;
  p.y = y.data;
  p.m = y.shape[0];
  p.n = y.shape[1];
  p.residual_stride = residual.stride[0];
  p.y_stride = y.stride[0];
  p.dtype = dtype;
  p.out_dtype = y.dtype;
  p.act = Act(act);
  p.gated = gated;
  return p;
}

void linear(py::object x_, py::object w_, py::object scales_, int format, int64_t n, bool gated,
            py::object bias_, int act, py::object residual_, py::object y_) {
  Call call("linear");
  TensorView x = call.tensor("x", x_, {DType::f32, DType::bf16}, {"M", "K"});
  call.bind("N", n);
  PackedView w = packed_weight(call, "w", w_, scales_, format, {x.dtype}, nullptr, n, x.shape[1], gated);
  LinearParams p = outputs(call, x.dtype, gated, bias_, act, residual_, y_);
  p.x = x.data;
  p.w = w.data.data;
  p.k = x.shape[1];
  p.x_stride = x.stride[0];
  p.scales = w.scales.data;
  p.format = w.format;
  call.run(MING_KERNEL(linear), p);
}

#if MING_BACKEND_CUDA
void linear_epilogue(py::object sums_, bool bf16_bias, bool gated, py::object bias_, int act,
                     py::object residual_, py::object y_) {
  Call call("linear_epilogue");
  TensorView sums = call.dense("sums", sums_, {DType::f32}, {"M", "sums"});
  call.expect(reinterpret_cast<uintptr_t>(sums.data) % 16 == 0, "sums: expected 16-byte alignment");
  LinearEpilogueParams p{
      outputs(call, bf16_bias ? DType::bf16 : DType::f32, gated, bias_, act, residual_, y_),
      sums.ptr<float>()};
  call.bind("sums", row_count(p.linear.n, gated));
  call.run(&cuda::linear_epilogue, p);
}
#endif

void pack_weight(py::object first_, py::object second_, py::object packed_, py::object scales_, int format) {
  Call call("pack_weight");
  const auto sources = {DType::f32, DType::bf16, DType::f16};
  TensorView first = call.tensor("weight", first_, sources, {"N", "K"});
  TensorView second = call.optional("up", second_, {first.dtype}, {"N", "K"});
  const int64_t n = first.shape[0], k = first.shape[1];
  const bool gated = bool(second);
  PackedView out = packed_weight(call, "packed", packed_, scales_, format, {DType::f32, DType::bf16}, nullptr,
                                 n, k, gated);
  PackParams p{{first.data, second.data},
               {first.stride[0], second.stride[0]},
               out.data.data,
               n,
               k,
               first.dtype,
               out.data.dtype,
               gated,
               out.scales.data,
               out.format};
  call.run(MING_KERNEL(pack_weight), p);
}

}  // namespace

void register_gemm(py::module_& m) {
  m.def("linear", &linear);
#if MING_BACKEND_CUDA
  m.def("linear_epilogue", &linear_epilogue);
#endif
  m.def("pack_weight", &pack_weight);
}

}  // namespace ming::binding
