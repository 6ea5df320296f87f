#include "hsdp/unit_errors.h"

#include <c10/util/Exception.h>

#include <cstring>

namespace hsdp_ckpt::hsdp {
namespace {

std::string Message(UnitName who, const char* what, const char* cause) {
  const std::string text =
      "rank " + std::to_string(who.rank) + ": the " + what + " of module " + who.unit + " failed: ";
  if (std::strstr(cause, "Could not resolve the process group") != nullptr) {
    return text +
           "its process group is gone. torch.distributed.destroy_process_group ends what a "
           "wrapped module can do; after another init_process_group wrap the module anew";
  }
  return text + cause +
         "\nA peer has died, has raised an error of its own, or does not run this module: see "
         "what the other ranks say";
}

}  // namespace

void RethrowNaming(UnitName who, const char* what) {
  try {
    throw;
  } catch (const c10::DistBackendError& error) {
    C10_THROW_ERROR(DistBackendError, Message(who, what, error.what_without_backtrace()));
  } catch (const c10::Error& error) {
    C10_THROW_ERROR(Error, Message(who, what, error.what_without_backtrace()));
  } catch (const std::exception& error) {
    C10_THROW_ERROR(DistBackendError, Message(who, what, error.what()));  // Gloo's own
  }
}

}  // namespace hsdp_ckpt::hsdp
