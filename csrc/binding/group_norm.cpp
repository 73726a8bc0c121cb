#include "ops/group_norm/group_norm.h"

#include "binding/check.h"

namespace ming::binding {
namespace {

void group_norm(py::object x_, py::object weight_, py::object bias_, py::object shift_, float eps,
                int64_t groups, bool per_frame, bool mish, int64_t before, py::object y_) {
  Call call("group_norm");
  TensorView x = call.tensor("x", x_, {DType::f32, DType::bf16}, {"B", "T", "C"});
  TensorView weight = call.tensor("weight", weight_, {x.dtype}, {"C"});
  TensorView bias = call.tensor("bias", bias_, {x.dtype}, {"C"});
  TensorView shift = call.optional("shift", shift_, {x.dtype}, {"B", "C"});
  TensorView y = call.tensor("y", y_, {x.dtype}, {"B", "P", "C"});
  call.expect(groups > 0 && x.shape[2] > 0 && x.shape[2] % groups == 0,
              "expected a number of groups that divides the " + std::to_string(x.shape[2]) +
                  " channels, got " + std::to_string(groups));
  call.expect(before >= 0 && before <= y.shape[1] - x.shape[1],
              "expected padding of 0 frames or more, got " + std::to_string(before) + " before and " +
                  std::to_string(y.shape[1] - x.shape[1] - before) + " after");
  GroupNormParams p{};
  p.x = x.data;
  p.weight = weight.data;
  p.bias = bias.data;
  p.shift = shift.data;
  p.y = y.data;
  p.batch = x.shape[0];
  p.frames = x.shape[1];
  p.channels = x.shape[2];
  p.groups = groups;
  p.before = before;
  p.out_frames = y.shape[1];
  p.x_item_stride = x.stride[0];
  p.x_frame_stride = x.stride[1];
  p.shift_stride = shift.stride[0];
  p.y_item_stride = y.stride[0];
  p.y_frame_stride = y.stride[1];
  p.eps = eps;
  p.per_frame = per_frame;
  p.mish = mish;
  p.dtype = x.dtype;
  call.run(MING_KERNEL(group_norm), p);
}

}  // namespace

void register_group_norm(py::module_& m) {
  m.def("group_norm", &group_norm);
}

}  // namespace ming::binding
