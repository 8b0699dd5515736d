// The private linear ops on the CPU: the gate, the check of the targets' values, the sweep.
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "cpu/sweep_kernels.h"
#include "ops/problem.h"
#include "sweep/class_sweep.h"

namespace torchmargin::cpu {
namespace {

// Where absent targets are not allowed, only ignore_index may lie outside [0, C).
void check_target_values(const at::Tensor& target, int64_t classes, int64_t ignore_index) {
  const at::Tensor contiguous = target.contiguous();
  const int64_t* const values = contiguous.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < contiguous.numel(); ++i) {
    TORCH_CHECK_INDEX(
        (values[i] >= 0 && values[i] < classes) || values[i] == ignore_index,
        "linear_margin_cross_entropy: expected target values in [0, ", classes, ") or ignore_index (", ignore_index,
        "), but got ", values[i], " at row ", i, " with C = ", classes, " classes");
  }
}

ForwardTuple linear_margin_forward_cpu(
    TORCHMARGIN_LINEAR_PARAMETERS,
    std::optional<int64_t> ignore_index,
    bool with_logit_sum,
    int64_t kept_classes) {
  const LinearProblem problem = make_linear_problem("_linear_margin_forward", TORCHMARGIN_LINEAR_ARGUMENTS);
  if (ignore_index.has_value()) {
    check_target_values(target, weight.size(0), *ignore_index);
  }
  return to_tuple(sweep_forward(problem, {ignore_index, with_logit_sum, kept_classes}, sweep_kernels()));
}

BackwardTuple linear_margin_backward_cpu(TORCHMARGIN_LINEAR_BACKWARD_PARAMETERS) {
  const LinearProblem problem = make_linear_problem("_linear_margin_backward", TORCHMARGIN_LINEAR_ARGUMENTS);
  return to_tuple(sweep_backward(
      problem, {grad_other_lse, grad_target_logit, grad_logit_sum, other_lse, kept, inverse_norms, weight_sum, wanted},
      sweep_kernels()));
}

TORCH_LIBRARY_IMPL(torchmargin, CPU, library) {
  library.impl("_linear_margin_forward", linear_margin_forward_cpu);
  library.impl("_linear_margin_backward", linear_margin_backward_cpu);
}

} // namespace
} // namespace torchmargin::cpu
