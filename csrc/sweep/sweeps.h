// The sweeps over classes that the private linear ops are, the same for every device. Problem and request have passed
// their gates.
#pragma once

#include "ops/problem.h"
#include "sweep/device.h"

namespace torchmargin {

// The private forward op: see ForwardResult.
ForwardResult sweep_forward(const LinearProblem& problem, const ForwardRequest& request, const Device& device);

// The private backward op: the gradients that request.wanted asks for.
Gradients sweep_backward(const LinearProblem& problem, const BackwardRequest& request, const Device& device);

// The targets alone: see call_target_rows().
TargetTuple sweep_targets(const LinearProblem& problem, const Device& device);

// The same loop for margin_logits, which returns every logit: products, scaled where they stand.
LogitsResult sweep_logits(const LinearProblem& problem, const Device& device);
Gradients
sweep_logits_backward(const LinearProblem& problem, const LogitsBackwardRequest& request, const Device& device);

} // namespace torchmargin
