#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>

namespace hsdp_ckpt::hsdp {

/// While it lives, this thread makes tensors and computes as if no transform of `torch.func` were
/// under way. A transform wraps what is computed within it, and a wrapped tensor has no memory of
/// its own; what the wrapper computes for itself is none of a transform's.
class OutsideOfTransforms {
  c10::impl::ExcludeDispatchKeyGuard front_{c10::DispatchKey::FuncTorchDynamicLayerFrontMode};
  c10::impl::ExcludeDispatchKeyGuard back_{c10::DispatchKey::FuncTorchDynamicLayerBackMode};
};

}  // namespace hsdp_ckpt::hsdp
