// The public linear ops. linear_margin_lse is the private forward without its
// by-products; linear_margin_cross_entropy is arithmetic on [B] vectors on top of it.
// Both are composite: autograd, Meta and the devices meet them as the private op.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cmath>

#include "ops/problem.h"
#include "sweep/chunk_plan.h"
#include "sweep/class_sweep.h"
#include "sweep/settings.h"

namespace torchmargin {
namespace {

// How many leading classes' products the forward should keep: none where no backward
// will come or where the sizes are symbolic (the plan must not guard on them).
int64_t choose_kept_classes(const LinearProblem& problem) {
  const auto wants_gradient = [](const std::optional<at::Tensor>& tensor) {
    return tensor.has_value() && tensor->requires_grad();
  };
  const bool backward_will_come = c10::GradMode::is_enabled() &&
      (wants_gradient(problem.input) || wants_gradient(problem.weight) || wants_gradient(problem.bias));
  const auto rows = problem.input.sym_size(0).maybe_as_int();
  const auto features = problem.input.sym_size(1).maybe_as_int();
  const auto classes = problem.weight.sym_size(0).maybe_as_int();
  if (!backward_will_come || !rows || !features || !classes) {
    return 0;
  }
  const SweepSizes sizes = sweep_sizes(*rows, *features, *classes, problem.weight);
  return choose_chunk_plan(sizes, workspace_limit(problem.input.device().type())).kept_classes;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_margin_lse(
    TORCHMARGIN_LINEAR_PARAMETERS) {
  const LinearProblem problem = make_linear_problem("linear_margin_lse", TORCHMARGIN_LINEAR_ARGUMENTS);
  const ForwardResult result = call_linear_forward(
      problem, {.ignore_index = std::nullopt, .with_logit_sum = true, .kept_classes = choose_kept_classes(problem)});
  return {result.other_lse, result.target_logit, result.logit_sum, result.target_angle, result.max_other_logit};
}

enum class Reduction { none, mean, sum };

Reduction parse_reduction(std::string_view op, std::string_view text) {
  if (text == "none") {
    return Reduction::none;
  }
  if (text == "mean") {
    return Reduction::mean;
  }
  TORCH_CHECK(text == "sum", op, ": expected reduction to be one of 'none', 'mean', 'sum', but got '", text, "'");
  return Reduction::sum;
}

at::Tensor linear_margin_cross_entropy(
    TORCHMARGIN_LINEAR_PARAMETERS,
    double label_smoothing,
    int64_t ignore_index,
    std::string_view reduction_name) {
  constexpr std::string_view op = "linear_margin_cross_entropy";
  const LinearProblem problem = make_linear_problem(op, TORCHMARGIN_LINEAR_ARGUMENTS);
  const Reduction reduction = parse_reduction(op, reduction_name);
  TORCH_CHECK(
      label_smoothing >= 0 && label_smoothing <= 1, op, ": expected label_smoothing in [0, 1], but got ",
      label_smoothing);

  const bool smooth = label_smoothing > 0;
  const ForwardResult result = call_linear_forward(
      problem, {.ignore_index = ignore_index, .with_logit_sum = smooth, .kept_classes = choose_kept_classes(problem)});

  // NB: ignored rows are replaced before and after the arithmetic. Once would let
  // 0 * NaN through to the gradients of an ignored row that holds NaN.
  const at::Tensor valid = target.ne(ignore_index);
  const at::Tensor zero = at::zeros({}, result.other_lse.options());
  const at::Tensor target_logit = at::where(valid, result.target_logit, zero);
  const at::Tensor gap = at::where(valid, result.other_lse, zero) - target_logit;
  // NB: softplus(o - t) by logaddexp: F.softplus becomes the identity above 20, and
  // lse - t has no digit left where the loss is small.
  at::Tensor loss = at::logaddexp(zero, gap);
  if (smooth) {
    const at::Tensor mean_logit = at::where(valid, result.logit_sum, zero).div(at::Scalar(weight.sym_size(0)));
    loss = loss + label_smoothing * (target_logit - mean_logit);
  }
  loss = at::where(valid, loss, zero);
  switch (reduction) {
    case Reduction::none:
      return loss;
    case Reduction::sum:
      return loss.sum();
    case Reduction::mean:
      return loss.sum() / valid.sum();
  }
  TORCH_INTERNAL_ASSERT(false);
}

TORCH_LIBRARY_IMPL(torchmargin, CompositeImplicitAutograd, library) {
  library.impl("linear_margin_lse", linear_margin_lse);
  library.impl("linear_margin_cross_entropy", linear_margin_cross_entropy);
}

} // namespace
} // namespace torchmargin
