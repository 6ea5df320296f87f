// How the runtime hands out the driver's functions.
#include <dlfcn.h>

#include "simgpu/cuda/api.h"

namespace {

int NotSimulated() { return cudaErrorNotSupported; }

}  // namespace

SIMGPU_API cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function,
                                                        unsigned, unsigned long long,
                                                        cudaDriverEntryPointQueryResult* status) {
  static void* const driver = dlopen("libcuda.so.1", RTLD_NOW);
  *function = driver == nullptr ? nullptr : dlsym(driver, symbol);
  // torch resolves whole tables of functions at once, most of which are never called.
  if (*function == nullptr) *function = reinterpret_cast<void*>(&NotSimulated);
  if (status != nullptr) *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
