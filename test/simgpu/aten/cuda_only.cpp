// Kernels that torch has for CUDA alone, and so none of the CPU's can stand in for: composed of
// others, which do.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include <array>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

namespace simgpu::aten {
namespace {

using at::Tensor;
using Three = std::tuple<Tensor, Tensor, Tensor>;

Tensor OrZeros(const std::optional<Tensor>& gradient, const Tensor& like) {
  return gradient && gradient->defined() ? *gradient : at::zeros_like(like);
}

/// The next hidden state, the next cell state, and the four gates for backward: input, forget,
/// cell, output, each (batch, width), beside each other.
Three LstmCell(const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& cx,
               const std::optional<Tensor>& input_bias, const std::optional<Tensor>& hidden_bias) {
  Tensor sums = input_gates + hidden_gates;
  if (input_bias && input_bias->defined()) sums = sums + *input_bias + *hidden_bias;
  const auto gates = sums.chunk(4, 1);
  const Tensor input = gates[0].sigmoid(), forget = gates[1].sigmoid();
  const Tensor cell = gates[2].tanh(), output = gates[3].sigmoid();
  const Tensor cy = forget * cx + input * cell;
  return {output * cy.tanh(), cy, at::cat({input, forget, cell, output}, 1)};
}

/// Gradients of the gates before their activations, of the cell state, of the bias.
Three LstmCellBackward(const std::optional<Tensor>& grad_hy, const std::optional<Tensor>& grad_cy,
                       const Tensor& cx, const Tensor& cy, const Tensor& workspace, bool has_bias) {
  if (!(grad_hy && grad_hy->defined()) && !(grad_cy && grad_cy->defined())) return {};
  const auto gates = workspace.chunk(4, 1);
  const Tensor &input = gates[0], &forget = gates[1], &cell = gates[2], &output = gates[3];
  const Tensor state = cy.tanh();
  const Tensor of_hidden = OrZeros(grad_hy, cy);
  const Tensor of_cell = OrZeros(grad_cy, cy) + of_hidden * output * (1 - state * state);
  const Tensor of_gates =
      at::cat({of_cell * cell * input * (1 - input), of_cell * cx * forget * (1 - forget),
               of_cell * input * (1 - cell * cell), of_hidden * state * output * (1 - output)},
              1);
  return {of_gates, of_cell * forget, has_bias ? of_gates.sum(0) : Tensor()};
}

/// Gradients of what has been normalized, and of the weight, summed as CUDA's kernel does: 16-bit
/// ones in float32. `rstd`: by row, with the normalized dimensions of size 1.
std::tuple<Tensor, Tensor> RmsNormBackward(const Tensor& grad, const Tensor& input,
                                           at::IntArrayRef normalized_shape, const Tensor& rstd,
                                           const std::optional<Tensor>& weight,
                                           std::array<bool, 2> wanted) {
  const auto first = input.dim() - static_cast<int64_t>(normalized_shape.size());
  std::vector<int64_t> outer(static_cast<size_t>(first)), inner(normalized_shape.size());
  std::iota(outer.begin(), outer.end(), 0);
  std::iota(inner.begin(), inner.end(), first);
  const at::ScalarType sums = at::toOpMathType(input.scalar_type());
  const Tensor normalized = input.to(sums) * rstd;
  const Tensor grads = grad.to(sums);
  const bool has_weight = weight && weight->defined();
  Tensor of_input, of_weight;
  if (wanted[0]) {
    const Tensor scaled = has_weight ? grads * weight->to(sums) : grads;
    const Tensor along = (scaled * normalized).mean(inner, /*keepdim=*/true);
    of_input = ((scaled - normalized * along) * rstd).to(input.scalar_type());
  }
  if (wanted[1] && has_weight) {
    const Tensor terms = grads * normalized;
    of_weight = (outer.empty() ? terms : terms.sum(outer)).to(weight->scalar_type());
  }
  return {of_input, of_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("_fused_rms_norm_backward", &RmsNormBackward);
  m.impl("_thnn_fused_lstm_cell", &LstmCell);
  m.impl("_thnn_fused_lstm_cell_backward_impl", &LstmCellBackward);
}

}  // namespace simgpu::aten
