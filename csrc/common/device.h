// The host side of a CUDA device, for code that does not see the CUDA headers.
#pragma once

namespace ming {

int device_count();  // throws std::runtime_error with the driver's words where there is none
int sm_count();      // multiprocessors of the current device
int capability();    // compute capability of the current device, 90 for 9.0

// Makes a device the current one of this thread for a while.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_;
};

}  // namespace ming
