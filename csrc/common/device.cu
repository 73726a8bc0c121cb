#include <atomic>

#include "common/device.h"
#include "common/gpu.h"

namespace ming {

#if defined(MING_EMU)

int device_count() {
  return 1;
}

int sm_count() {
  return 4;
}

int capability() {
  return 80;
}

DeviceScope::DeviceScope(int) : before_(-1) {}
DeviceScope::~DeviceScope() {}

#else

namespace {
std::atomic<DeviceStatus*> known_status{nullptr};
}

DeviceStatus* device_status() {
  // Host memory that every device can write: a look at it needs no copy and no wait.
  static DeviceStatus* const status = [] {
    void* memory = nullptr;
    gpu::check(cudaHostAlloc(&memory, sizeof(DeviceStatus), cudaHostAllocMapped | cudaHostAllocPortable),
               "status word");
    known_status = new (memory) DeviceStatus{};
    return known_status.load();
  }();
  return status;
}

DeviceStatus* known_device_status() {
  return known_status;
}

int device_count() {
  int count = 0;
  gpu::check(cudaGetDeviceCount(&count), "CUDA driver");
  return count;
}

int sm_count() {
  int device = 0, count = 0;
  gpu::check(cudaGetDevice(&device), "sm_count");
  gpu::check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "sm_count");
  return count;
}

int capability() {
  int device = 0, major = 0, minor = 0;
  gpu::check(cudaGetDevice(&device), "capability");
  gpu::check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "capability");
  gpu::check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "capability");
  return 10 * major + minor;
}

DeviceScope::DeviceScope(int device) : before_(-1) {
  int current = -1;
  gpu::check(cudaGetDevice(&current), "current device");
  if (current == device) return;
  gpu::check(cudaSetDevice(device), "current device");
  before_ = current;
}

DeviceScope::~DeviceScope() {
  if (before_ >= 0) cudaSetDevice(before_);
}

#endif

}  // namespace ming
