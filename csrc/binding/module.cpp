// The extension modules ming_rt._cpu, ming_rt._cuda and ming_rt._emu: registration only.
#include <pybind11/pybind11.h>

#if MING_BACKEND_CUDA
#include "common/device.h"
#include "common/device_status.h"
#else
#include "common/cpu_dispatch.h"
#include "common/thread_pool.h"
#endif

namespace py = pybind11;

namespace ming::binding {
void register_attention(py::module_& m);
void register_audio_bpe(py::module_& m);
void register_conv(py::module_& m);
void register_decode(py::module_& m);
void register_embed(py::module_& m);
void register_experts(py::module_& m);
void register_gemm(py::module_& m);
void register_group_norm(py::module_& m);
void register_image(py::module_& m);
void register_istft(py::module_& m);
void register_moe(py::module_& m);
void register_norm(py::module_& m);
void register_resize(py::module_& m);
void register_rope(py::module_& m);
void register_sampling(py::module_& m);
void register_sine_source(py::module_& m);
void register_spectral(py::module_& m);

#if MING_BACKEND_CUDA
// What a kernel found wrong since the last call, None or (sentence, value), and forgets it.
py::object take_fault() {
  DeviceStatus* status = known_device_status();
  if (!status) return py::none();
  const volatile int32_t* word = &status->fault;
  if (*word == 0) return py::none();
  const auto found = py::make_tuple(fault_text(Fault(*word)), status->value);
  *status = {};
  return found;
}
#endif
}  // namespace ming::binding

PYBIND11_MODULE(MING_MODULE, m) {
  using namespace ming;
  m.doc() = "Kernels of ming_rt; called through ming_rt.ops, which documents them.";
#if MING_BACKEND_CUDA
  m.def("device_count", &device_count);
  m.def("take_fault", &binding::take_fault);
#else
  m.def("isa", [] { return isa_name(active_isa()); });
  m.def("best_isa", [] { return isa_name(best_isa()); });
  m.def("set_isa", [](const char* name) { set_isa(isa_from_name(name)); });
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads);
  binding::register_spectral(m);
  binding::register_resize(m);
#endif
  binding::register_attention(m);
  binding::register_audio_bpe(m);
  binding::register_conv(m);
  binding::register_decode(m);
  binding::register_embed(m);
  binding::register_experts(m);
  binding::register_gemm(m);
  binding::register_group_norm(m);
  binding::register_image(m);
  binding::register_istft(m);
  binding::register_moe(m);
  binding::register_norm(m);
  binding::register_rope(m);
  binding::register_sampling(m);
  binding::register_sine_source(m);
}
