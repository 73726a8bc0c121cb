#include "ops/conv/conv.h"

#include "binding/check.h"

namespace ming::binding {
namespace {

void conv_frames(const py::list& inputs, int64_t frames, int act, py::object alpha_, float slope, float scale,
                 int64_t before, py::object y_) {
  Call call("conv_frames");
  call.expect(inputs.size() >= 1 && inputs.size() <= kMaxFrameInputs,
              "x: expected 1 to 3 tensors, got " + std::to_string(inputs.size()));
  call.expect(act >= 0 && act <= int(FrameAct::snake), "expected an activation of 0..2");
  ConvFramesParams p{};
  TensorView x = call.tensor("x", inputs[0], {DType::f32}, {"S", "rows of x", "C"});
  for (const py::handle& input : inputs) {
    TensorView other = call.tensor("x", input, {DType::f32}, {"S", "rows of x", "C"});
    call.expect((x.shape[0] == 1 || other.stride[0] == x.stride[0]) && other.stride[1] == x.stride[1],
                "x: expected inputs of the same strides");
    p.x[p.inputs++] = other.ptr<float>();
  }
  TensorView alpha = call.optional("alpha", alpha_, {DType::f32}, {"C"});
  TensorView y = call.dense("y", y_, {DType::f32}, {"dilation", "rows", "C"});
  call.expect(bool(alpha) == (FrameAct(act) == FrameAct::snake), "alpha belongs to snake and only to it");
  call.expect(x.shape[2] > 0, "x: expected at least one channel");
  call.expect(frames >= 0 && frames <= x.shape[0] * x.shape[1],
              "expected at most the " + std::to_string(x.shape[0] * x.shape[1]) + " frames of x, got " +
                  std::to_string(frames));
  call.expect(before >= 0 && before <= y.shape[0] * y.shape[1] - frames,
              "expected padding of 0 frames or more");
  p.alpha = alpha.ptr<float>();
  p.y = y.ptr<float>();
  p.frames = frames;
  p.channels = x.shape[2];
  p.split = x.shape[0];
  p.x_phase_stride = x.stride[0];
  p.x_frame_stride = x.stride[1];
  p.before = before;
  p.dilation = y.shape[0];
  p.rows = y.shape[1];
  p.scale = scale;
  p.slope = slope;
  p.act = FrameAct(act);
  if (p.rows > 0) call.run(MING_KERNEL(conv_frames), p);
}

}  // namespace

void register_conv(py::module_& m) {
  m.def("conv_frames", &conv_frames);
}

}  // namespace ming::binding
