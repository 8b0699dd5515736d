// The sweep over classes: the loop that both passes of the linear ops are made of,
// the same for every device. A device supplies the kernels of kernels.h; the products
// are ATen's.
#pragma once

#include "ops/problem.h"
#include "sweep/kernels.h"

namespace torchmargin {

// The private forward op: see ForwardResult.
ForwardResult sweep_forward(const LinearProblem& problem, const ForwardRequest& request, const SweepKernels& kernels);

// The private backward op: the gradients that request.wanted asks for.
Gradients sweep_backward(const LinearProblem& problem, const BackwardRequest& request, const SweepKernels& kernels);

// The same loop for margin_logits, which returns every logit: products, scaled where they stand.
LogitsResult sweep_logits(const LinearProblem& problem, const SweepKernels& kernels);
Gradients
sweep_logits_backward(const LinearProblem& problem, const LogitsBackwardRequest& request, const SweepKernels& kernels);

} // namespace torchmargin
