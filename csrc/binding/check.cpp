#include "binding/check.h"

#include <cstdlib>
#include <cstring>

#include "dlpack/dlpack.h"

namespace ming::binding {
namespace {

#if MING_BACKEND_CUDA && !defined(MING_EMU)
constexpr DLDeviceType kDevice = kDLCUDA;
constexpr const char* kDeviceName = "CUDA";
#else
constexpr DLDeviceType kDevice = kDLCPU;
constexpr const char* kDeviceName = "CPU";
#endif

// The exchange table of the last tensor type seen; one type (torch.Tensor) is the rule. Guarded by the GIL.
PyTypeObject* cached_type = nullptr;
const DLPackExchangeAPI* cached_api = nullptr;

const DLPackExchangeAPI* exchange_api(PyTypeObject* type) {
  if (type == cached_type) return cached_api;
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (!capsule) {
    PyErr_Clear();
    return nullptr;
  }
  auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (!api) {
    PyErr_Clear();
    return nullptr;
  }
  if (api->header.version.major != DLPACK_MAJOR_VERSION || !api->dltensor_from_py_object_no_sync)
    return nullptr;
  Py_INCREF(type);  // keeps the address from being reused by another type
  Py_XDECREF(cached_type);
  cached_type = type;
  cached_api = api;
  return api;
}

DType dtype_of(DLDataType t) {
  if (t.lanes != 1) return DType::other;
  switch (t.code) {
    case kDLFloat:
      return t.bits == 32 ? DType::f32 : t.bits == 16 ? DType::f16 : DType::other;
    case kDLBfloat:
      return t.bits == 16 ? DType::bf16 : DType::other;
    case kDLUInt:
      return t.bits == 8 ? DType::u8 : DType::other;
    case kDLInt:
      return t.bits == 32 ? DType::i32 : t.bits == 64 ? DType::i64 : DType::other;
    default:
      return DType::other;
  }
}

std::string shape_text(const TensorView& t) {
  std::string s = "[";
  for (int i = 0; i < t.ndim; ++i) s += (i ? ", " : "") + std::to_string(t.shape[i]);
  return s + "]";
}

std::string dims_text(std::initializer_list<const char*> dims) {
  std::string s = "[";
  for (const char* d : dims) s += (s.size() > 1 ? std::string(", ") : std::string()) + d;
  return s + "]";
}

bool is_number(const char* s) {
  return *s >= '0' && *s <= '9';
}

}  // namespace

void Call::fail(const std::string& message) const {
  throw py::value_error(std::string(op_) + ": " + message);
}

#if MING_BACKEND_CUDA
Stream Call::current_stream() const {
  Stream stream = nullptr;
  if (kDevice == kDLCUDA && cached_api->current_work_stream(kDLCUDA, device_, &stream) != 0)
    throw py::error_already_set();
  return stream;
}
#endif

const int64_t* Call::find(const char* name) const {
  for (const auto& [known, bound] : dims_)
    if (std::strcmp(known, name) == 0) return &bound;
  return nullptr;
}

void Call::bind(const char* name, int64_t value) {
  const int64_t* bound = find(name);
  if (!bound)
    dims_.emplace_back(name, value);
  else if (*bound != value)
    fail(std::string(name) + ": expected " + std::to_string(*bound) + ", got " + std::to_string(value));
}

int64_t Call::dim(const char* name) const {
  const int64_t* bound = find(name);
  if (!bound) fail(std::string("dimension ") + name + " is not bound");
  return *bound;
}

TensorView Call::tensor(const char* name, py::handle object, std::initializer_list<DType> dtypes,
                        std::initializer_list<const char*> dims) {
  const DLPackExchangeAPI* api = exchange_api(Py_TYPE(object.ptr()));
  if (!api)
    throw py::type_error(std::string(op_) + ": " + name + ": expected a torch tensor, got " +
                         Py_TYPE(object.ptr())->tp_name);
  DLTensor t;
  if (api->dltensor_from_py_object_no_sync(object.ptr(), &t) != 0) throw py::error_already_set();

  if (t.device.device_type != kDevice) fail(std::string(name) + ": expected a " + kDeviceName + " tensor");
  if (device_ >= 0 && t.device.device_id != device_)
    fail(std::string(name) + ": expected a tensor on device " + std::to_string(device_) + ", got device " +
         std::to_string(t.device.device_id));
  device_ = t.device.device_id;
  TensorView view;
  view.dtype = dtype_of(t.dtype);
  bool known = false;
  std::string wanted;
  for (DType d : dtypes) {
    known |= d == view.dtype;
    wanted += (wanted.empty() ? "" : " or ") + std::string(dtype_name(d));
  }
  if (!known) fail(std::string(name) + ": expected " + wanted + ", got " + dtype_name(view.dtype));

  view.ndim = t.ndim <= TensorView::kMaxDims ? t.ndim : 0;
  for (int i = 0; i < view.ndim; ++i) {
    view.shape[i] = t.shape[i];
    view.stride[i] = t.strides[i];
  }
  if (size_t(t.ndim) != dims.size())
    fail(std::string(name) + ": expected shape " + dims_text(dims) + ", got " + shape_text(view));
  view.data = static_cast<char*>(t.data) + t.byte_offset;
  const int last = view.ndim - 1;
  if (last >= 0 && view.shape[last] > 1 && view.stride[last] != 1)
    fail(std::string(name) + ": expected a contiguous last dimension, got stride " +
         std::to_string(view.stride[last]));

  int i = 0;
  for (const char* d : dims) {
    const int64_t size = view.shape[i++];
    const int64_t* bound = find(d);
    const int64_t expected = is_number(d) ? std::atoll(d) : bound ? *bound : size;
    if (expected != size)
      fail(std::string(name) + ": expected shape " + dims_text(dims) + " with " + d + " = " +
           std::to_string(expected) + ", got " + shape_text(view));
    if (!is_number(d) && !bound) dims_.emplace_back(d, size);
  }
  return view;
}

TensorView Call::optional(const char* name, py::handle object, std::initializer_list<DType> dtypes,
                          std::initializer_list<const char*> dims) {
  return object.is_none() ? TensorView{} : tensor(name, object, dtypes, dims);
}

TensorView Call::dense(const char* name, py::handle object, std::initializer_list<DType> dtypes,
                       std::initializer_list<const char*> dims) {
  TensorView view = tensor(name, object, dtypes, dims);
  int64_t expected = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    if (view.shape[i] > 1 && view.stride[i] != expected)
      fail(std::string(name) + ": expected a contiguous tensor, got stride " +
           std::to_string(view.stride[i]) + " in dimension " + std::to_string(i));
    if (view.shape[i] > 0) expected *= view.shape[i];  // an empty tensor's strides count 0 as 1
  }
  return view;
}

}  // namespace ming::binding
