#pragma once

#include <memory>
#include <string>

#include "format/metadata.h"
#include "format/record_dtype.h"

namespace hsdp_ckpt::checkpoint {

/// A shape that many tensors have: a model has few. Null for none.
using SharedShape = std::shared_ptr<const format::Shape>;

struct PlannedTensor {
  std::string fqn;
  const format::RecordDtype* dtype = nullptr;
  SharedShape size;     ///< of the whole tensor, in elements
  size_t sharding = 0;  ///< which of the plan's
  /// What the metadata says of the coordinator's local tensor.
  SharedShape strides{};
  bool pinned = false;
};

}  // namespace hsdp_ckpt::checkpoint
