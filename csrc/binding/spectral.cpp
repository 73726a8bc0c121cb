#include "ops/spectral/spectral.h"

#include "binding/check.h"

namespace ming::binding {
namespace {

void resample(py::object x_, py::object y_, py::object first_, py::object weight_, int64_t step) {
  Call call("resample");
  TensorView x = call.dense("x", x_, {DType::f32}, {"padded"});
  TensorView y = call.dense("y", y_, {DType::f32}, {"outputs"});
  TensorView first = call.dense("first", first_, {DType::i32}, {"phases"});
  TensorView weight = call.dense("weight", weight_, {DType::f32}, {"phases", "taps"});
  const int64_t outputs = y.shape[0], phases = first.shape[0], taps = weight.shape[1];
  call.expect(outputs >= 1 && phases >= 1 && step >= 1, "expected at least one output, phase and step");
  call.expect(taps > 0 && taps % 16 == 0, "weight: expected a multiple of 16 taps");
  for (int64_t p = 0; p < phases && p < outputs; ++p) {
    const int64_t at = first.ptr<int32_t>()[p], last = (outputs - 1 - p) / phases;
    const int64_t room = x.shape[0] - at - taps;  // for the steps to the phase's last window
    call.expect(at >= 0 && room >= 0 && last <= room / step, "x: expected room for every window");
  }
  ResampleParams p{
      x.ptr<float>(), y.ptr<float>(), first.ptr<int32_t>(), weight.ptr<float>(), outputs, phases, taps, step};
  py::gil_scoped_release release;
  cpu::resample(p);
}

MelParams mel_params(Call& call, py::object wave_, py::object out_, py::object window_, py::object filters_,
                     float floor, const char* bins) {
  TensorView wave = call.dense("wave", wave_, {DType::f32}, {"samples"});
  TensorView out = call.dense("out", out_, {DType::f32}, {"frames", "mels"});
  TensorView window = call.dense("window", window_, {DType::f32}, {"400"});
  TensorView filters = call.dense("filters", filters_, {DType::f32}, {"mels", bins});
  call.expect(out.shape[0] >= 1 && out.shape[1] >= 1, "out: expected at least one frame and one mel band");
  call.expect(floor >= 1e-30f, "floor: expected at least 1e-30");
  return {wave.ptr<float>(), out.ptr<float>(), window.ptr<float>(), filters.ptr<float>(),
          wave.shape[0],     out.shape[0],     out.shape[1],        floor};
}

void log_mel(py::object wave, py::object out, py::object window, py::object filters, float floor) {
  Call call("log_mel");
  MelParams p = mel_params(call, wave, out, window, filters, floor, "201");
  call.expect(p.samples > 200, "wave: expected more than 200 samples, got " + std::to_string(p.samples));
  call.bind("frames", p.samples / 160);
  py::gil_scoped_release release;
  cpu::log_mel(p);
}

void fbank(py::object wave, py::object out, py::object window, py::object filters, float floor) {
  Call call("fbank");
  MelParams p = mel_params(call, wave, out, window, filters, floor, "257");
  call.expect(p.samples >= 400, "wave: expected at least 400 samples, got " + std::to_string(p.samples));
  call.bind("frames", 1 + (p.samples - 400) / 160);
  py::gil_scoped_release release;
  cpu::fbank(p);
}

void lfr_cmvn(py::object in_, py::object shift_, py::object scale_, py::object out_, int64_t stack,
              int64_t stride) {
  Call call("lfr_cmvn");
  TensorView in = call.dense("frames", in_, {DType::f32}, {"T", "D"});
  TensorView shift = call.dense("shift", shift_, {DType::f32}, {"width"});
  TensorView scale = call.dense("scale", scale_, {DType::f32}, {"width"});
  TensorView out = call.dense("out", out_, {DType::f32}, {"rows", "width"});
  call.expect(in.shape[0] >= 1 && in.shape[1] >= 1, "frames: expected at least one value");
  call.expect(stack >= 1 && stride >= 1 && stack <= INT32_MAX && stride <= INT32_MAX,
              "expected a stack and a stride of at least 1");
  call.bind("width", stack * in.shape[1]);
  LfrCmvnParams p{in.ptr<float>(), shift.ptr<float>(), scale.ptr<float>(), out.ptr<float>(),
                  in.shape[0],     in.shape[1],        out.shape[0],       stack,
                  stride};
  py::gil_scoped_release release;
  cpu::lfr_cmvn(p);
}

}  // namespace

void register_spectral(py::module_& m) {
  m.def("resample", &resample);
  m.def("log_mel", &log_mel);
  m.def("fbank", &fbank);
  m.def("lfr_cmvn", &lfr_cmvn);
}

}  // namespace ming::binding
