// The private linear ops on the CPU: the gate, the check of the targets' values, the sweep.
#include <torch/library.h>

#include "cpu/sweep_kernels.h"
#include "cpu/target_values.h"
#include "ops/problem.h"
#include "sweep/class_sweep.h"

namespace torchmargin::cpu {
namespace {

ForwardTuple linear_margin_forward_cpu(
    TORCHMARGIN_LINEAR_PARAMETERS,
    std::optional<int64_t> ignore_index,
    bool with_logit_sum,
    int64_t kept_classes) {
  const LinearProblem problem = make_linear_problem("_linear_margin_forward", TORCHMARGIN_LINEAR_ARGUMENTS);
  if (ignore_index.has_value()) {
    check_target_values("linear_margin_cross_entropy", target, weight.size(0), *ignore_index);
  }
  return to_tuple(sweep_forward(problem, {ignore_index, with_logit_sum, kept_classes}, sweep_kernels()));
}

BackwardTuple linear_margin_backward_cpu(TORCHMARGIN_LINEAR_BACKWARD_PARAMETERS) {
  const LinearProblem problem = make_linear_problem("_linear_margin_backward", TORCHMARGIN_LINEAR_ARGUMENTS);
  return to_tuple(sweep_backward(
      problem, {grad_other_lse, grad_target_logit, grad_logit_sum, other_lse, kept, inverse_norms, weight_sum, wanted},
      sweep_kernels()));
}

std::tuple<at::Tensor, at::Tensor> margin_logits_forward_cpu(TORCHMARGIN_LINEAR_PARAMETERS) {
  const LogitsResult result =
      sweep_logits(make_linear_problem("_margin_logits_forward", TORCHMARGIN_LINEAR_ARGUMENTS), sweep_kernels());
  return {result.logits, result.inverse_norms};
}

BackwardTuple margin_logits_backward_cpu(TORCHMARGIN_LOGITS_BACKWARD_PARAMETERS) {
  const LinearProblem problem = make_linear_problem("_margin_logits_backward", TORCHMARGIN_LINEAR_ARGUMENTS);
  return to_tuple(sweep_logits_backward(problem, {grad_logits, inverse_norms, wanted}, sweep_kernels()));
}

TORCH_LIBRARY_IMPL(torchmargin, CPU, library) {
  library.impl("_linear_margin_forward", linear_margin_forward_cpu);
  library.impl("_linear_margin_backward", linear_margin_backward_cpu);
  library.impl("_margin_logits_forward", margin_logits_forward_cpu);
  library.impl("_margin_logits_backward", margin_logits_backward_cpu);
}

} // namespace
} // namespace torchmargin::cpu
