#include "ops/spectral/istft.h"

#include "binding/check.h"

namespace ming::binding {
namespace {

void istft(py::object x_, py::object basis_, py::object window_, int64_t hop, float limit, float bound,
           bool log_sine, py::object wave_) {
  Call call("istft");
  TensorView x = call.dense("x", x_, {DType::f32}, {"frames", "columns"});
  TensorView window = call.dense("window", window_, {DType::f32}, {"size"});
  const int64_t frames = x.shape[0], size = window.shape[0];
  call.expect(size >= 2 && size <= kMaxIstftSize && size % 2 == 0,
              "window: expected an even size of 2..64, got " + std::to_string(size));
  // Below an eighth of the size the frames of a block of samples would not fit into shared memory.
  call.expect(hop * 8 >= size && hop * 2 <= size,
              "hop: expected an eighth to a half of the window's size, got " + std::to_string(hop));
  call.expect(frames >= 1, "x: expected at least one frame");
  call.bind("columns", size + 2);
  TensorView basis = call.dense("basis", basis_, {DType::f32}, {"size", "columns"});
  TensorView wave = call.dense("wave", wave_, {DType::f32}, {"samples"});
  call.bind("samples", (frames - 1) * hop);
  IstftParams p{x.ptr<float>(),
                basis.ptr<float>(),
                window.ptr<float>(),
                wave.ptr<float>(),
                frames,
                hop,
                int32_t(size),
                limit,
                bound,
                log_sine};
  call.run(MING_KERNEL(istft), p);
}

}  // namespace

void register_istft(py::module_& m) {
  m.def("istft", &istft);
}

}  // namespace ming::binding
