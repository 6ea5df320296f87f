#pragma once

#include <functional>
#include <string>

#include "base/error.h"

namespace hsdp_ckpt {

/// The message of the CorruptionError that `call` throws; "no error" if it throws none.
inline std::string ErrorOf(const std::function<void()>& call) {
  try {
    call();
  } catch (const base::CorruptionError& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace hsdp_ckpt
