// linear_margin_binary_cross_entropy: one against all, from the sums of the same sweep; arithmetic on [B] vectors.
#include "ops/binary_cross_entropy.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "ops/checks.h"
#include "ops/class_weight.h"
#include "ops/cross_entropy.h"
#include "ops/kept_classes.h"
#include "ops/problem.h"
#include "ops/target_place.h"

namespace torchmargin {
namespace {

BinaryKind parse_kind(std::string_view op, std::string_view kind) {
  if (kind == "c") {
    return BinaryKind::cosine;
  }
  if (kind == "a") {
    return BinaryKind::angle;
  }
  TORCH_CHECK(kind == "m", op, ": expected kind to be one of 'c', 'a', 'm', but got '", kind, "'");
  return BinaryKind::before;
}

// The margin of the own class's cosine, before the curve.
MarginParameters margin_of(const BinaryForm& form, double scale) {
  MarginParameters margin{.scale = scale};
  if (form.kind == BinaryKind::angle) {
    margin.m2 = form.margin;
    margin.extension = Extension::continuous;
  } else if (form.kind == BinaryKind::before) {
    margin.m3 = form.margin;
  }
  return margin;
}

void check_weight(std::string_view op, const char* argument, double weight) {
  TORCH_CHECK(
      std::isfinite(weight) && weight >= 0, op, ": expected ", argument, " to be finite and not negative, but got ",
      weight);
}

struct Loss {
  at::Tensor value;
  ForwardResult result;
  at::Tensor valid; // [B] bool
};

Loss binary_loss(TORCHMARGIN_BINARY_PARAMETERS) {
  constexpr std::string_view op = "linear_margin_binary_cross_entropy";
  const LinearProblem problem = make_binary_problem(op, TORCHMARGIN_BINARY_ARGUMENTS);
  const Reduction reduce = make_cross_entropy_options(op, /*label_smoothing=*/0.0, ignore_index, reduction).reduction;
  refuse_no_classes(op, problem);
  check_class_weight(op, class_weight, input, problem.classes(), /*label_smoothing=*/0.0);
  TORCH_CHECK(
      !defined(class_weight).has_value() || require_target, op,
      ": expected require_target with class_weight: a row without a class has no weight");

  const ForwardResult result = call_linear_forward(
      problem,
      {.ignore_index = require_target ? std::optional<int64_t>(ignore_index) : std::nullopt,
       .with_logit_sum = true,
       .kept_classes = choose_kept_classes(problem)});
  const at::Tensor valid = target.ne(ignore_index);
  const at::Tensor rows = binary_losses(
      result.other_lse, result.target_logit, target, problem.classes(),
      {.positive_weight = positive_weight, .negative_weight = negative_weight, .ignore_index = ignore_index});
  at::Tensor value = rows;
  if (const auto weight = defined(class_weight); weight.has_value()) {
    value = weighted_loss(rows, *weight, target, ignore_index, reduce);
  } else if (reduce == Reduction::sum) {
    value = rows.sum();
  } else if (reduce == Reduction::mean) {
    value = rows.sum() / valid.sum();
  }
  return {value.to(problem.acc()), result, valid};
}

at::Tensor linear_margin_binary_cross_entropy(TORCHMARGIN_BINARY_PARAMETERS) {
  return binary_loss(TORCHMARGIN_BINARY_ARGUMENTS).value;
}
// See linear_margin_cross_entropy_statistics.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_margin_binary_cross_entropy_statistics(
    TORCHMARGIN_BINARY_PARAMETERS) {
  const Loss loss = binary_loss(TORCHMARGIN_BINARY_ARGUMENTS);
  const at::NoGradGuard no_grad;
  const at::Tensor zero = at::zeros({}, loss.result.target_angle.options());
  const auto mean = [&](const at::Tensor& rows) { return at::where(loss.valid, rows, zero).sum() / loss.valid.sum(); };
  const at::Tensor right =
      (scale * loss.result.target_angle.cos()).gt(loss.result.max_other_logit).to(zero.scalar_type());
  return {loss.value, mean(loss.result.target_angle), mean(right), mean(loss.result.max_other_logit)};
}

// See linear_margin_partials.
PartialsTuple linear_margin_binary_partials(TORCHMARGIN_BINARY_PARAMETERS, int64_t calls) {
  constexpr std::string_view op = "_linear_margin_binary_partials";
  const LinearProblem problem = make_binary_problem(op, TORCHMARGIN_BINARY_ARGUMENTS);
  TORCH_CHECK(calls > 0, op, ": expected calls to be positive, but got ", calls);
  const ForwardResult r = call_linear_forward(
      problem,
      {.ignore_index = std::nullopt, .with_logit_sum = true, .kept_classes = choose_kept_classes(problem, calls)});
  const at::NoGradGuard no_grad;
  const at::Tensor zero = at::zeros({}, r.target_angle.options());
  const at::Tensor plain =
      at::where(target_place(target, problem.classes()).present, scale * r.target_angle.cos(), zero);
  return {r.other_lse,     r.target_logit, at::zeros_like(r.other_lse), r.target_angle, r.max_other_logit, plain,
          r.hardest_logit, r.hardest_class};
}

at::Tensor margin_binary_loss(
    const at::Tensor& other_sum,
    const at::Tensor& target_logit,
    const at::Tensor& target,
    int64_t num_classes,
    double positive_weight,
    double negative_weight,
    int64_t ignore_index) {
  return binary_losses(
      other_sum, target_logit, target, num_classes,
      {.positive_weight = positive_weight, .negative_weight = negative_weight, .ignore_index = ignore_index});
}

TORCH_LIBRARY_IMPL(torchmargin, CompositeImplicitAutograd, library) {
  library.impl("_linear_margin_binary_partials", linear_margin_binary_partials);
  library.impl("_margin_binary_loss", margin_binary_loss);
  library.impl("linear_margin_binary_cross_entropy", linear_margin_binary_cross_entropy);
  library.impl("_linear_margin_binary_cross_entropy_statistics", linear_margin_binary_cross_entropy_statistics);
}

} // namespace

LinearProblem make_binary_problem(std::string_view op, TORCHMARGIN_BINARY_PARAMETERS) {
  LinearProblem problem;
  problem.input = input;
  problem.weight = weight;
  problem.target = target;
  problem.bias = defined(bias);
  problem.compute_dtype = compute_dtype;
  problem.sub_centers = sub_centers;
  problem.binary = {.kind = parse_kind(op, kind), .margin = margin, .power = power};
  problem.margins.parameters = margin_of(problem.binary, scale);
  check_problem(op, problem);
  check_weight(op, "positive_weight", positive_weight);
  check_weight(op, "negative_weight", negative_weight);
  make_cross_entropy_options(op, /*label_smoothing=*/0.0, ignore_index, reduction);
  return problem;
}

at::Tensor binary_losses(
    const at::Tensor& other_sum,
    const at::Tensor& target_logit,
    const at::Tensor& target,
    const c10::SymInt& classes,
    const BinaryLossOptions& options) {
  const at::Tensor valid = target.ne(options.ignore_index);
  const at::Tensor zero = at::zeros({}, other_sum.options().requires_grad(false));
  // NB: 0 * NaN would reach rows that have no upstream gradient: where a sum is NaN the loss is, and has none.
  const at::Tensor unknown = other_sum.isnan().logical_or(target_logit.isnan());
  const at::Tensor used = valid.logical_and(unknown.logical_not());
  const at::Tensor others = at::where(used, other_sum, zero);
  const at::Tensor own =
      at::where(target_place(target, classes).present, at::logaddexp(zero, -at::where(used, target_logit, zero)), zero);
  const at::Tensor nan = zero + std::numeric_limits<double>::quiet_NaN();
  const at::Tensor weighted = options.positive_weight * own + options.negative_weight * others;
  return at::where(valid, at::where(unknown, nan, weighted), zero);
}

} // namespace torchmargin
