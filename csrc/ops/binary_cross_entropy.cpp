// linear_margin_binary_cross_entropy: one against all, from the sums of the same sweep; arithmetic on [B] vectors.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

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
  const Reduction reduce = make_cross_entropy_options(op, /*label_smoothing=*/0.0, ignore_index, reduction).reduction;
  refuse_no_classes(op, problem);

  const ForwardResult result = call_linear_forward(
      problem, {.ignore_index = std::nullopt, .with_logit_sum = true, .kept_classes = choose_kept_classes(problem)});
  const at::Tensor valid = target.ne(ignore_index);
  const at::Tensor zero = at::zeros({}, result.other_lse.options().requires_grad(false));
  // NB: 0 * NaN would reach rows that have no upstream gradient: where a sum is NaN the loss is, and has none.
  const at::Tensor unknown = result.other_lse.isnan().logical_or(result.target_logit.isnan());
  const at::Tensor used = valid.logical_and(unknown.logical_not());
  const at::Tensor others = at::where(used, result.other_lse, zero);
  const at::Tensor own = at::where(
      target_place(target, problem.classes()).present, at::logaddexp(zero, -at::where(used, result.target_logit, zero)),
      zero);
  const at::Tensor nan = zero + std::numeric_limits<double>::quiet_NaN();
  const at::Tensor rows =
      at::where(valid, at::where(unknown, nan, positive_weight * own + negative_weight * others), zero);
  const at::ScalarType acc = problem.acc();
  at::Tensor value = rows;
  if (reduce == Reduction::sum) {
    value = rows.sum();
  } else if (reduce == Reduction::mean) {
    value = rows.sum() / valid.sum();
  }
  return {value.to(acc), result, valid};
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

TORCH_LIBRARY_IMPL(torchmargin, CompositeImplicitAutograd, library) {
  library.impl("linear_margin_binary_cross_entropy", linear_margin_binary_cross_entropy);
  library.impl("_linear_margin_binary_cross_entropy_statistics", linear_margin_binary_cross_entropy_statistics);
}

} // namespace
} // namespace torchmargin
