#include "ops/image/image.h"

#include <pybind11/stl.h>

#include <array>

#include "binding/check.h"

namespace ming::binding {
namespace {

void patchify(py::object frames_, py::object rows_, std::array<float, 3> mean, std::array<float, 3> std) {
  Call call("patchify");
  TensorView frames = call.dense("frames", frames_, {DType::u8, DType::f32}, {"T", "H", "W", "3"});
  TensorView rows = call.dense("rows", rows_, {DType::f32}, {"patches", "1176"});
  const int64_t t = frames.shape[0], h = frames.shape[1], w = frames.shape[2];
  call.expect(t >= 1 && (t == 1 || t % 2 == 0),
              "frames: expected 1 or an even number, got " + std::to_string(t));
  call.expect(h % 28 == 0 && w % 28 == 0, "frames: expected height and width divisible by 28");
  call.bind("patches", (t + 1) / 2 * (h / 14) * (w / 14));
  PatchifyParams p{frames.data, rows.ptr<float>(), t, h, w, {}, {}, frames.dtype};
  for (int c = 0; c < 3; ++c) {
    p.mean[c] = mean[c];
    p.std[c] = std[c];
  }
  call.run(MING_KERNEL(patchify), p);
}

}  // namespace

void register_image(py::module_& m) {
  m.def("patchify", &patchify);
}

}  // namespace ming::binding
