// Checked access to Python tensors: device -> dtype -> layout -> shape, in this order, with dimensions that
// are named once and matched across the tensors of one call. The only place that knows how tensors reach C++.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "common/tensor.h"

namespace ming::binding {

namespace py = pybind11;

class Call {
 public:
  explicit Call(const char* op) : op_(op) {}

  // A CPU tensor of one of `dtypes` whose shape matches `dims`: a name binds or must equal an earlier
  // binding, a number must match exactly. The last dimension must be contiguous; outer ones may be strided.
  // Errors are ValueError (TypeError for a non-tensor): "<op>: <name>: expected ..., got ...".
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

 private:
  // The value of a bound name, else nullptr.
  const int64_t* find(const char* name) const;

  const char* op_;
  std::vector<std::pair<const char*, int64_t>> dims_;
};

}  // namespace ming::binding
