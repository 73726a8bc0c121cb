#include "binding/check.h"
#include "ops/image/image.h"

namespace ming::binding {
namespace {

// One axis' window table; every window must lie inside the `in` inputs.
ResizeAxis axis(Call& call, const char* name, py::object start_, py::object weight_, DType dtype,
                const char* out, int64_t in) {
  const std::string label(name);
  TensorView start = call.optional((label + "_start").c_str(), start_, {DType::i32}, {out});
  call.expect(start_.is_none() == weight_.is_none(), label + ": start and weight are given together");
  if (!start) return {nullptr, nullptr, 0};
  TensorView weight =
      call.dense((label + "_weight").c_str(), weight_, {dtype}, {out, label == "x" ? "xtaps" : "ytaps"});
  const int64_t taps = weight.shape[1];
  call.expect(start.shape[0] >= 1 && taps >= 1, label + "_weight: expected at least one output and tap");
  for (int64_t i = 0; i < start.shape[0]; ++i) {
    const int64_t first = start.ptr<int32_t>()[i];
    call.expect(first >= 0 && first + taps <= in, label + "_start: expected windows inside the picture");
  }
  return {start.ptr<int32_t>(), weight.data, taps};
}

void resize_u8(py::object image_, py::object out_, py::object temp_, py::object x_start, py::object x_weight,
               py::object y_start, py::object y_weight) {
  Call call("resize_u8");
  TensorView image = call.dense("image", image_, {DType::u8}, {"H", "W", "C"});
  TensorView out = call.dense("out", out_, {DType::u8}, {"h", "w", "C"});
  const int64_t channels = image.shape[2];
  call.expect(channels >= 1 && channels <= 4,
              "image: expected 1 to 4 channels, got " + std::to_string(channels));
  ResizeAxis x = axis(call, "x", x_start, x_weight, DType::i32, "w", image.shape[1]);
  ResizeAxis y = axis(call, "y", y_start, y_weight, DType::i32, "h", image.shape[0]);
  call.expect(x.start || y.start, "expected a window table for at least one axis");
  call.expect(out.shape[0] >= 1 && out.shape[1] >= 1, "out: expected at least one pixel");
  if (!x.start) call.bind("W", out.shape[1]);
  if (!y.start) call.bind("H", out.shape[0]);
  TensorView temp;
  if (x.start && y.start) temp = call.dense("temp", temp_, {DType::u8}, {"H", "w", "C"});
  ResizeParams p{image.data,   out.data,     temp.data,     1, 1, image.shape[0], image.shape[1],
                 out.shape[0], out.shape[1], int(channels), x, y, DType::u8,      DType::u8};
  call.run(MING_KERNEL(resize_u8), p);
}

void resize_frames(py::object frames_, py::object out_, py::object temp_, py::object x_start,
                   py::object x_weight, py::object y_start, py::object y_weight) {
  Call call("resize_frames");
  TensorView frames = call.dense("frames", frames_, {DType::u8, DType::f32}, {"T", "H", "W", "C"});
  TensorView out = call.dense("out", out_, {DType::u8, DType::f32}, {"T", "h", "w", "C"});
  TensorView temp = call.dense("temp", temp_, {DType::f32}, {"chunk", "H", "w", "C"});
  const int64_t channels = frames.shape[3];
  call.expect(channels >= 1 && channels <= 4,
              "frames: expected 1 to 4 channels, got " + std::to_string(channels));
  call.expect(temp.shape[0] >= 1, "temp: expected room for at least one frame");
  ResizeAxis x = axis(call, "x", x_start, x_weight, DType::f32, "w", frames.shape[2]);
  ResizeAxis y = axis(call, "y", y_start, y_weight, DType::f32, "h", frames.shape[1]);
  call.expect(x.start && y.start, "expected a window table for both axes");
  ResizeParams p{frames.data,
                 out.data,
                 temp.data,
                 frames.shape[0],
                 temp.shape[0],
                 frames.shape[1],
                 frames.shape[2],
                 out.shape[1],
                 out.shape[2],
                 int(channels),
                 x,
                 y,
                 frames.dtype,
                 out.dtype};
  call.run(MING_KERNEL(resize_frames), p);
}

}  // namespace

void register_resize(py::module_& m) {
  m.def("resize_u8", &resize_u8);
  m.def("resize_frames", &resize_frames);
}

}  // namespace ming::binding
