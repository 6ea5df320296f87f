#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace hsdp_ckpt::hsdp {

/// Points `tensor`, and all views of it, to `data`, whose bytes stay the lender's. The tensor must
/// not outlive them: TakeBack comes first.
void Lend(const at::Tensor& tensor, void* data);

/// Takes the memory of `tensor`, and of all views of it, away. Their sizes stay; whoever reads or
/// writes them now gets a c10::Error that says `message`. Without elements there is nothing to use,
/// and nothing to raise.
void TakeBack(const at::Tensor& tensor, const std::string& message);

}  // namespace hsdp_ckpt::hsdp
