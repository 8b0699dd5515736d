// The private linear ops, once for all devices: the gate, the check of the targets' values, the sweep.
#pragma once

#include <torch/library.h>

#include "ops/hard_negatives.h"
#include "ops/problem.h"
#include "sweep/sweeps.h"

namespace torchmargin {

// On, a device: its Guard is made of it while a sweep runs, and its check_target_values() is where absent targets are
// not allowed.
template <typename On, const Device& (*device)()>
struct LinearOps {
  using Guard = typename On::Guard;

  static ForwardTuple forward(TORCHMARGIN_PACKED_LINEAR_PARAMETERS, TORCHMARGIN_FORWARD_REQUEST_PARAMETERS) {
    constexpr std::string_view op = "_linear_margin_forward";
    const LinearProblem problem = make_linear_problem(op, TORCHMARGIN_PACKED_LINEAR_ARGUMENTS);
    const ForwardRequest request{TORCHMARGIN_FORWARD_REQUEST_ARGUMENTS};
    check_request(op, problem, request);
    const Guard guard(input.device());
    if (ignore_index.has_value()) {
      On::check_target_values(
          problem.one_against_all() ? "linear_margin_binary_cross_entropy" : "linear_margin_cross_entropy", target,
          weight.size(0) / problem.sub_centers, *ignore_index);
    }
    check_coefficient_values(problem, /*all_finite=*/ignore_index.has_value() && with_logit_sum);
    return to_tuple(sweep_forward(problem, request, device()));
  }

  static BackwardTuple backward(TORCHMARGIN_PACKED_LINEAR_PARAMETERS, TORCHMARGIN_BACKWARD_REQUEST_PARAMETERS) {
    constexpr std::string_view op = "_linear_margin_backward";
    const LinearProblem problem = make_linear_problem(op, TORCHMARGIN_PACKED_LINEAR_ARGUMENTS);
    const BackwardRequest request{TORCHMARGIN_BACKWARD_REQUEST_ARGUMENTS};
    check_request(op, problem, request);
    const Guard guard(input.device());
    return to_tuple(sweep_backward(problem, request, device()));
  }

  // The rows of the weight that stand for the targets: no sweep.
  static TargetTuple targets(TORCHMARGIN_PACKED_LINEAR_PARAMETERS) {
    const LinearProblem problem = make_linear_problem("_linear_target_rows", TORCHMARGIN_PACKED_LINEAR_ARGUMENTS);
    const Guard guard(input.device());
    check_coefficient_values(problem, /*all_finite=*/false);
    return sweep_targets(problem, device());
  }

  static LogitsTuple logits(TORCHMARGIN_PACKED_LINEAR_PARAMETERS) {
    const LinearProblem problem = make_linear_problem("_margin_logits_forward", TORCHMARGIN_PACKED_LINEAR_ARGUMENTS);
    const Guard guard(input.device());
    return to_tuple(sweep_logits(problem, device()));
  }

  static BackwardTuple logits_backward(
      TORCHMARGIN_PACKED_LINEAR_PARAMETERS,
      TORCHMARGIN_LOGITS_BACKWARD_REQUEST_PARAMETERS) {
    constexpr std::string_view op = "_margin_logits_backward";
    const LinearProblem problem = make_linear_problem(op, TORCHMARGIN_PACKED_LINEAR_ARGUMENTS);
    const LogitsBackwardRequest request{TORCHMARGIN_LOGITS_BACKWARD_REQUEST_ARGUMENTS};
    check_request(op, problem, request);
    const Guard guard(input.device());
    return to_tuple(sweep_logits_backward(problem, request, device()));
  }

  static void add_to(torch::Library& library) {
    library.impl("_linear_target_rows", targets);
    library.impl("_linear_margin_forward", forward);
    library.impl("_linear_margin_backward", backward);
    library.impl("_margin_logits_forward", logits);
    library.impl("_margin_logits_backward", logits_backward);
  }
};

} // namespace torchmargin
