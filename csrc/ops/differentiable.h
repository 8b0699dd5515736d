// What makes a private op differentiable, once for all of them: below autograd the op itself; with a tangent of
// forward-mode AD its formula (formula.h); else a node. The node of a forward op calls its backward op; that of a
// backward op differentiates the formula once more, which holds B x C matrices.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>

#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "ops/autograd_node.h"
#include "ops/margins.h"

namespace torchmargin {

// The arguments of a call as autograd sees them.
struct CallArguments {
  OptionalTensors inputs; // that have gradients, in the order in which the backward op returns them
  OptionalTensors others; // the other tensors
  std::vector<double> numbers; // all else

  OptionalTensors all() const; // inputs, then others
};

// Results of an op that have gradients, from its differentiable inputs (undefined where there is none).
using Formula = std::function<Tensors(const Tensors& inputs)>;

// What a forward op's node calls. `saved`: inputs, others, then the results that were kept.
using Backward = std::function<Tensors(const Tensors& grads, const Tensors& saved, const std::vector<bool>& wanted)>;

// The results of a forward op, the first `outputs` of them differentiable.
//   below()    the op below autograd: all results      formula()    the differentiable ones, by ATen
//   keep       the places of results that the backward reads
template <typename Below, typename Results>
Tensors differentiable_forward(
    const char* node,
    CallArguments call,
    size_t outputs,
    std::vector<size_t> keep,
    Below below,
    Results formula,
    Backward backward) {
  Tensors results;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    results = below();
  }
  OptionalTensors tensors = call.all();
  if (any_has_tangent(tensors)) {
    Tensors differentiable = formula();
    std::move(differentiable.begin(), differentiable.end(), results.begin());
  } else if (any_requires_grad(call.inputs)) {
    attach_node(
        results, outputs, call.inputs,
        {node, std::move(tensors), std::move(keep), std::move(call.numbers), std::move(backward)});
  }
  return results;
}

// A forward op's formula from what the node of its backward op has saved (inputs and others) and the upstream
// gradients.
using MakeFormula = std::function<Formula(const Tensors& saved, const OptionalTensors& upstream)>;

// The results of a backward op: gradients of call.inputs, an empty [0] tensor where they are not wanted.
// `upstream`: the gradients that it was given.
Tensors differentiable_backward(
    const char* node,
    CallArguments call,
    const OptionalTensors& upstream,
    const std::vector<bool>& wanted,
    const std::function<Tensors()>& below,
    MakeFormula make_formula);

// Rows of `input` [B, ...] that hold NaN or infinity but have no upstream gradient [B] at all, as zeros:
// they contribute exactly nothing. The same for the margins of rows [B]; a 0-dim one stays.
at::Tensor without_unused_rows(const at::Tensor& input, const OptionalTensors& upstream);
void take_out_unused_rows(Margins& margins, const OptionalTensors& upstream);

} // namespace torchmargin
