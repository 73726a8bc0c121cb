// A borrowed, strided tensor: what a binding checks and an op's Params are filled from.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace ming {

struct TensorView {
  static constexpr int kMaxDims = 8;
  void* data = nullptr;  // first element; nullptr for an optional tensor that was not given
  DType dtype = DType::other;
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements

  explicit operator bool() const { return data != nullptr || ndim != 0; }
  template <typename T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
};

}  // namespace ming
