// Derivatives of gradients, for all ops alike: the op's formula (ops/formula.h) is evaluated
// with autograd's own graph, and that graph differentiated twice. It holds B x C matrices.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "ops/autograd_node.h"

namespace torchmargin {

// Results of the op, from its differentiable inputs (undefined where there is none).
using Formula = std::function<Tensors(const Tensors& inputs)>;

// The gradients of `inputs` (those that `wanted` names) for the gradients `upstream` of the
// formula's results, with a graph: for forward-mode AD of a backward pass.
Tensors formula_gradients(
    const OptionalTensors& inputs,
    const OptionalTensors& upstream,
    const std::vector<bool>& wanted,
    const Formula& formula);

// What a backward op's node returns: from the gradients of each of its results (one for each
// of `inputs`) those of `inputs` and `upstream`, in this order.
Tensors second_derivatives(
    const OptionalTensors& inputs,
    const OptionalTensors& upstream,
    const Tensors& grads_of_gradients,
    const std::vector<bool>& wanted,
    const Formula& formula);

// Rows of `input` [B, ...] that hold NaN or infinity but have no upstream gradient [B] at all, as zeros:
// they contribute exactly nothing. The same for the margins of rows [B]; a 0-dim one stays.
at::Tensor without_unused_rows(const at::Tensor& input, const OptionalTensors& upstream);
std::optional<at::Tensor> without_unused_rows(const std::optional<at::Tensor>& sample, const OptionalTensors& upstream);

} // namespace torchmargin
