#include "ops/kept_classes.h"

#include "ops/logit_bounds.h"
#include "plan/sweep_plan.h"

namespace torchmargin {

int64_t choose_kept_classes(const LinearProblem& problem, int64_t calls) {
  const bool backward_will_come =
      wants_gradient(problem.input) || wants_gradient(problem.weight) || wants_gradient(problem.bias);
  const auto rows = problem.input.sym_size(0).maybe_as_int();
  const auto features = problem.input.sym_size(1).maybe_as_int();
  const auto classes = problem.classes().maybe_as_int();
  if (!backward_will_come || !rows || !features || !classes || *classes == 0) {
    return 0;
  }
  const at::Tensor& weight = problem.weight;
  const SweepPlan plan = make_sweep_plan(
      {.rows = *rows,
       .features = *features,
       .classes = *classes,
       .dtype = weight.scalar_type(),
       .compute_dtype = problem.compute_dtype,
       .weight_in_rows = has_contiguous_rows(weight),
       .wide = problem.binary.kind == BinaryKind::angle,
       .calls = calls,
       .centers = problem.sub_centers,
       .fused = fits_fused_tiles(problem)},
      traits_of(weight.device()), weight.device().type());
  return plan.chunks.kept_classes;
}

} // namespace torchmargin
