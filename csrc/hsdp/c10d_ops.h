#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace hsdp_ckpt::hsdp {

/// One of c10d's operators, "c10d::send" for instance, by the dispatcher: these have one schema in
/// torch 2.11 to 2.15; the methods of ProcessGroup were renamed in between. To be kept in a static.
template <typename Signature>
auto FindOp(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace hsdp_ckpt::hsdp
