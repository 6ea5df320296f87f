#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace hsdp_ckpt::hsdp {

/// Points `tensor`, and all views of it, to `data`, a piece of the memory of `lender`. Both stay in
/// memory together until TakeBack.
void Lend(const at::Tensor& tensor, const at::Tensor& lender, void* data);

/// Takes the memory of `tensor`, and of all views of it, away. Their sizes stay; whoever reads or
/// writes them now gets a c10::Error that says `message`. Without elements there is nothing to use,
/// and nothing to raise.
void TakeBack(const at::Tensor& tensor, const std::string& message);

/// A contiguous tensor whose storage is a piece of the memory of `lender` and keeps that: saving or
/// copying it takes its own bytes only.
at::Tensor PieceOf(const at::Tensor& lender, void* data, at::IntArrayRef sizes,
                   at::ScalarType dtype);

/// The memory that an allocator gave for `tensor`: its storage's own, or its lender's.
const at::DataPtr& OwnedMemory(const at::Tensor& tensor);

}  // namespace hsdp_ckpt::hsdp
