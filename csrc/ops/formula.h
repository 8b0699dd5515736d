// The ops as formulas of ATen, differentiable in every mode and to any order. They hold
// B x C matrices: only second derivatives and forward-mode AD come here. The same formulas,
// to be read, are torchmargin.reference.
#pragma once

#include "ops/cosine_problem.h"
#include "ops/problem.h"

namespace torchmargin {

// What the private forward of the linear ops returns, without a record.
// mark_seam: a target's logit and its derivatives are NaN where they have no second derivative:
// at theta = 0 and pi, and at a zero row that is not normalised, unless no angle is added to theta.
// hardest_class: as a forward returned it; undefined: ranked here.
ForwardResult linear_formula(const LinearProblem& problem, const at::Tensor& hardest_class, bool mark_seam);
// [B, C] acc.
at::Tensor logits_formula(const LinearProblem& problem, bool mark_seam);
CosineResult cosine_formula(const CosineProblem& problem);
// psi, elementwise, in the cosine's dtype.
at::Tensor transform_formula(const at::Tensor& cosine, const MarginParameters& margin);

} // namespace torchmargin
