// The private linear ops on the CPU: the gate, the check of the targets' values, the sweep.
#include <torch/library.h>

#include "cpu/device.h"
#include "cpu/target_values.h"
#include "ops/problem.h"
#include "sweep/sweeps.h"

namespace torchmargin::cpu {
namespace {

ForwardTuple linear_margin_forward_cpu(TORCHMARGIN_PACKED_LINEAR_PARAMETERS, TORCHMARGIN_FORWARD_REQUEST_PARAMETERS) {
  constexpr std::string_view op = "_linear_margin_forward";
  const LinearProblem problem = make_linear_problem(op, TORCHMARGIN_PACKED_LINEAR_ARGUMENTS);
  const ForwardRequest request{TORCHMARGIN_FORWARD_REQUEST_ARGUMENTS};
  check_request(op, problem, request);
  if (ignore_index.has_value()) {
    check_target_values("linear_margin_cross_entropy", target, weight.size(0), *ignore_index);
  }
  return to_tuple(sweep_forward(problem, request, device()));
}

BackwardTuple linear_margin_backward_cpu(
    TORCHMARGIN_PACKED_LINEAR_PARAMETERS,
    TORCHMARGIN_BACKWARD_REQUEST_PARAMETERS) {
  constexpr std::string_view op = "_linear_margin_backward";
  const LinearProblem problem = make_linear_problem(op, TORCHMARGIN_PACKED_LINEAR_ARGUMENTS);
  const BackwardRequest request{TORCHMARGIN_BACKWARD_REQUEST_ARGUMENTS};
  check_request(op, problem, request);
  return to_tuple(sweep_backward(problem, request, device()));
}

LogitsTuple margin_logits_forward_cpu(TORCHMARGIN_PACKED_LINEAR_PARAMETERS) {
  const LinearProblem problem = make_linear_problem("_margin_logits_forward", TORCHMARGIN_PACKED_LINEAR_ARGUMENTS);
  return to_tuple(sweep_logits(problem, device()));
}

BackwardTuple margin_logits_backward_cpu(
    TORCHMARGIN_PACKED_LINEAR_PARAMETERS,
    TORCHMARGIN_LOGITS_BACKWARD_REQUEST_PARAMETERS) {
  constexpr std::string_view op = "_margin_logits_backward";
  const LinearProblem problem = make_linear_problem(op, TORCHMARGIN_PACKED_LINEAR_ARGUMENTS);
  const LogitsBackwardRequest request{TORCHMARGIN_LOGITS_BACKWARD_REQUEST_ARGUMENTS};
  check_request(op, problem, request);
  return to_tuple(sweep_logits_backward(problem, request, device()));
}

TORCH_LIBRARY_IMPL(torchmargin, CPU, library) {
  library.impl("_linear_margin_forward", linear_margin_forward_cpu);
  library.impl("_linear_margin_backward", linear_margin_backward_cpu);
  library.impl("_margin_logits_forward", margin_logits_forward_cpu);
  library.impl("_margin_logits_backward", margin_logits_backward_cpu);
}

} // namespace
} // namespace torchmargin::cpu
