// Checked access to Python tensors: device -> dtype -> layout -> shape, in this order, with dimensions that
// are named once and matched across the tensors of one call. The only place that knows how tensors reach C++.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "common/device.h"
#include "common/op.h"
#include "common/tensor.h"

// Each binding source is compiled into ming_rt._cpu (MING_BACKEND_CUDA = 0) and into the modules whose
// kernels are CUDA sources, ming_rt._cuda and ming_rt._emu (1).
#if MING_BACKEND_CUDA
#define MING_KERNEL(name) (&::ming::cuda::name)
#else
#define MING_KERNEL(name) (&::ming::cpu::name)
#endif

namespace ming::binding {

namespace py = pybind11;

// Whether the values inside tensors can be checked here. Device memory cannot be read: CUDA kernels guard
// against wild indices themselves (common/device_status.h).
constexpr bool kReadsValues = !MING_BACKEND_CUDA;

class Call {
 public:
  explicit Call(const char* op) : op_(op) {}

  // A tensor on the module's kind of device (the same for all of the call) of one of `dtypes` whose shape
  // matches `dims`: a name binds or must equal an earlier binding, a number must match exactly. The last
  // dimension must be contiguous; outer ones may be strided. Errors are ValueError (TypeError for a
  // non-tensor): "<op>: <name>: expected ..., got ...".
  TensorView tensor(const char* name, py::handle object, std::initializer_list<DType> dtypes,
                    std::initializer_list<const char*> dims);

  // The same, but None gives an empty view.
  TensorView optional(const char* name, py::handle object, std::initializer_list<DType> dtypes,
                      std::initializer_list<const char*> dims);

  // As tensor(), and every dimension must be contiguous.
  TensorView dense(const char* name, py::handle object, std::initializer_list<DType> dtypes,
                   std::initializer_list<const char*> dims);

  // The value a name was bound to by an earlier tensor of this call.
  int64_t dim(const char* name) const;

  // Binds or matches a name against a number that comes from a plain argument.
  void bind(const char* name, int64_t value);

  void expect(bool condition, const std::string& message) const {
    if (!condition) fail(message);
  }
  [[noreturn]] void fail(const std::string& message) const;

#if MING_BACKEND_CUDA
  // Launches on torch's current stream of the tensors' device.
  template <typename Params>
  void run(void (*kernel)(const Params&, Stream), const Params& p) const {
    const DeviceScope scope(device_ < 0 ? 0 : device_);
    kernel(p, current_stream());
  }
#else
  template <typename Params>
  void run(void (*kernel)(const Params&), const Params& p) const {
    py::gil_scoped_release release;
    kernel(p);
  }
#endif

 private:
  // The value of a bound name, else nullptr.
  const int64_t* find(const char* name) const;
  Stream current_stream() const;

  const char* op_;
  int device_ = -1;
  std::vector<std::pair<const char*, int64_t>> dims_;
};

}  // namespace ming::binding
