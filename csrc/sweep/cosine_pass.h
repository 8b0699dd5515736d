// The private ops on given cosines, the same for every device: allocate, describe, call.
#pragma once

#include "ops/cosine_problem.h"
#include "sweep/cosine_kernels.h"

namespace torchmargin {

CosineResult cosine_pass(const CosineProblem& problem, bool with_logit_sum, const CosineKernels& kernels);
CosineGradients
cosine_backward_pass(const CosineProblem& problem, const CosineBackwardRequest& request, const CosineKernels& kernels);

// psi of every cosine, or with a gradient: grad * dpsi/dc.
at::Tensor transform_pass(
    const at::Tensor& cosine,
    const std::optional<at::Tensor>& grad,
    const MarginParameters& margin,
    const CosineKernels& kernels);

} // namespace torchmargin
