// libcuda.so.1, of which torch uses little beside its runtime: the primary context, which is always
// there. What is not here is not found, and whoever asks for it by name is told so.
#include <cstring>

#define DRIVER_API extern "C" __attribute__((visibility("default")))

namespace {
constexpr int kSuccess = 0;
int g_context = 0;
}  // namespace

DRIVER_API int cuInit(unsigned) { return kSuccess; }
DRIVER_API int cuDriverGetVersion(int* version) {
  *version = 13020;
  return kSuccess;
}
DRIVER_API int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return kSuccess;
}
DRIVER_API int cuDeviceGetAttribute(int* value, int, int) {
  *value = 0;
  return kSuccess;
}
DRIVER_API int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* is_active) {
  *flags = 0;
  *is_active = 1;
  return kSuccess;
}
DRIVER_API int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = &g_context;
  return kSuccess;
}
DRIVER_API int cuCtxGetCurrent(void** context) {
  *context = &g_context;
  return kSuccess;
}
DRIVER_API int cuCtxSetCurrent(void*) { return kSuccess; }
DRIVER_API int cuGetErrorString(int, const char** text) {
  *text = "not simulated";
  return kSuccess;
}
