#include "ops/sine_source/sine_source.h"

#include "binding/check.h"

namespace ming::binding {
namespace {

void sine_source(py::object f0_, py::object noise_, py::object phase_, py::object weight_, py::object bias_,
                 float rate, float amplitude, float sigma, float threshold, bool interpolated,
                 py::object source_, py::object sines_, py::object workspace_) {
  Call call("sine_source");
  TensorView f0 = call.dense("f0", f0_, {DType::f32}, {"frames"});
  TensorView source = call.dense("source", source_, {DType::f32}, {"samples"});
  const int64_t frames = f0.shape[0], samples = source.shape[0];
  call.expect(frames > 0 && samples > 0 && samples % frames == 0,
              "expected at least one frame and a whole number of samples in each");
  TensorView noise = call.dense("noise", noise_, {DType::f32}, {"H", "samples"});
  const int64_t harmonics = noise.shape[0];
  call.expect(harmonics >= 1 && harmonics <= kMaxHarmonics,
              "noise: expected 1 to 65 harmonics, got " + std::to_string(harmonics));
  TensorView phase = call.optional("phase", phase_, {DType::f32}, {"H"});
  TensorView weight = call.dense("weight", weight_, {DType::f32}, {"H"});
  TensorView bias = call.dense("bias", bias_, {DType::f32}, {"1"});
  TensorView sines{};
  if (!sines_.is_none()) sines = call.dense("sines", sines_, {DType::f32}, {"H", "samples"});
  call.expect(rate > 0, "expected a positive rate");
  SineSourceParams p{};
  if (MING_BACKEND_CUDA) {
    TensorView workspace = call.dense("workspace", workspace_, {DType::u8}, {"bytes"});
    call.expect(workspace.shape[0] >= frames * harmonics * int64_t(sizeof(double)),
                "workspace: expected 8 bytes per frame and harmonic");
    call.expect(reinterpret_cast<uintptr_t>(workspace.data) % alignof(double) == 0,
                "workspace: expected alignment to 8 bytes");
    p.workspace = workspace.ptr<double>();
  }
  p.f0 = f0.ptr<float>();
  p.noise = noise.ptr<float>();
  p.phase = phase.ptr<float>();
  p.weight = weight.ptr<float>();
  p.bias = bias.ptr<float>();
  p.source = source.ptr<float>();
  p.sines = sines.ptr<float>();
  p.frames = frames;
  p.hop = samples / frames;
  p.harmonics = harmonics;
  p.rate = rate;
  p.amplitude = amplitude;
  p.sigma = sigma;
  p.threshold = threshold;
  p.interpolated = interpolated;
  call.run(MING_KERNEL(sine_source), p);
}

}  // namespace

void register_sine_source(py::module_& m) {
  m.def("sine_source", &sine_source);
}

}  // namespace ming::binding
