// The extension module ming_rt._cpu: registration only.
#include <pybind11/pybind11.h>

#include "common/cpu_dispatch.h"
#include "common/thread_pool.h"

namespace py = pybind11;

namespace ming::binding {
void register_image(py::module_& m);
void register_gemm(py::module_& m);
void register_attention(py::module_& m);
void register_rope(py::module_& m);
void register_moe(py::module_& m);
void register_norm(py::module_& m);
void register_sampling(py::module_& m);
void register_spectral(py::module_& m);
}  // namespace ming::binding

PYBIND11_MODULE(_cpu, m) {
  using namespace ming;
  m.doc() = "CPU kernels of ming_rt; called through ming_rt.ops, which documents them.";
  m.def("isa", [] { return isa_name(active_isa()); });
  m.def("best_isa", [] { return isa_name(best_isa()); });
  m.def("set_isa", [](const char* name) { set_isa(isa_from_name(name)); });
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads);

  binding::register_image(m);
  binding::register_gemm(m);
  binding::register_attention(m);
  binding::register_rope(m);
  binding::register_moe(m);
  binding::register_norm(m);
  binding::register_sampling(m);
  binding::register_spectral(m);
}
