// The extension module: one Bind function a room, each in its own bind_*.cpp, and what was built.
#include "python/module.h"

#include <map>
#include <string>

namespace hsdp_ckpt::python {
namespace {

std::map<std::string, std::string> BuildInfo() {
  std::map<std::string, std::string> info{{"torch", HSDP_CKPT_TORCH_VERSION},
                                          {"compiler", __VERSION__}};
#ifdef HSDP_CKPT_WITH_CUDA
  info["cuda"] = HSDP_CKPT_CUDA_VERSION;
  info["cuda_archs"] = HSDP_CKPT_CUDA_ARCHS;
#else
  info["cuda"] = "";
  info["cuda_archs"] = "";
#endif
#ifdef HSDP_CKPT_WITH_ISAL
  info["crc32"] = "isa-l";
#else
  info["crc32"] = "zlib";
#endif
  return info;
}

}  // namespace
}  // namespace hsdp_ckpt::python

PYBIND11_MODULE(_C, module) {
  using namespace hsdp_ckpt::python;
  module.def("_build_info", &BuildInfo);
  BindCheckpoint(module);
  BindErrors(module);
  BindHsdp(module);
  BindLoad(module);
  BindMetadata(module);
  BindObjects(module);
  BindParameters(module);
  BindPlan(module);
  BindReader(module);
  BindSnapshot(module);
  BindVerify(module);
#ifdef HSDP_CKPT_TESTS
  BindTestHooks(module);
#endif
}
