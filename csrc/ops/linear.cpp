// The public linear ops. linear_margin_lse is the private forward without its
// by-products; linear_margin_cross_entropy is arithmetic on [B] vectors on top of it.
// Both are composite: autograd, Meta and the devices meet them as the private op.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "ops/class_weight.h"
#include "ops/cross_entropy.h"
#include "ops/hard_negatives.h"
#include "ops/kept_classes.h"
#include "ops/problem.h"

namespace torchmargin {
namespace {

// NB: a shard without the target cannot know the row's own threshold, and a guess would be silently wrong.
void demand_threshold(std::string_view op, const LinearProblem& problem) {
  TORCH_CHECK(
      !problem.hard_coefficients.has_value() || problem.hard_threshold.has_value(), op,
      ": expected hard_threshold with hard_coefficients: a row's own class may be in another shard");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_margin_lse(
    TORCHMARGIN_LINEAR_PARAMETERS) {
  const LinearProblem problem = make_linear_problem("linear_margin_lse", TORCHMARGIN_LINEAR_ARGUMENTS);
  demand_threshold("linear_margin_lse", problem);
  const ForwardResult result = call_linear_forward(
      problem, {.ignore_index = std::nullopt, .with_logit_sum = true, .kept_classes = choose_kept_classes(problem)});
  const at::ScalarType acc = problem.acc();
  return {
      result.other_lse.to(acc), result.target_logit.to(acc), result.logit_sum.to(acc), result.target_angle,
      result.max_other_logit};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
linear_margin_lse_hardest(TORCHMARGIN_LINEAR_PARAMETERS, int64_t hardest) {
  constexpr std::string_view op = "linear_margin_lse_hardest";
  TORCH_CHECK(hardest > 0, op, ": expected hardest to be positive, but got ", hardest);
  const LinearProblem problem = make_linear_problem(op, TORCHMARGIN_LINEAR_ARGUMENTS, hardest);
  const ForwardResult r = call_linear_forward(
      problem, {.ignore_index = std::nullopt, .with_logit_sum = true, .kept_classes = choose_kept_classes(problem)});
  const at::ScalarType acc = problem.acc();
  return {r.other_lse.to(acc), r.target_logit.to(acc),  r.logit_sum.to(acc), r.target_angle,
          r.max_other_logit,   r.hardest_logit.to(acc), r.hardest_class};
}

// Radians, float64; only the angle: which center is nearest is found again wherever it is needed.
at::Tensor
wide_target_angle(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target, int64_t sub_centers) {
  const LinearProblem problem = make_linear_problem(
      "linear_target_angle", input, weight, target, /*bias=*/std::nullopt, /*scale=*/1.0, /*m1=*/1.0, /*m2=*/0.0,
      /*m3=*/0.0, /*sample_m2=*/std::nullopt, /*sample_m3=*/std::nullopt, /*sample_margin_weight=*/std::nullopt, "none",
      /*margin_weight=*/1.0, "exact", /*normalize_input=*/true, /*normalize_weight=*/true,
      /*compute_dtype=*/std::nullopt, sub_centers, /*hard_threshold=*/std::nullopt,
      /*hard_coefficients=*/std::nullopt);
  const at::NoGradGuard no_grad;
  return std::get<0>(call_target_rows(problem));
}

at::Tensor
linear_target_angle(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target, int64_t sub_centers) {
  const at::Tensor angle = wide_target_angle(input, weight, target, sub_centers);
  return angle.to(acc_dtype(input.scalar_type()));
}

at::Tensor plain_margin_op(
    const at::Tensor& target_angle,
    double m1,
    double m2,
    double m3,
    const std::optional<at::Tensor>& sample_m2,
    const std::optional<at::Tensor>& sample_m3) {
  Margins margins;
  margins.parameters.m1 = m1;
  margins.parameters.m2 = m2;
  margins.parameters.m3 = m3;
  margins.sample_m2 = defined(sample_m2);
  margins.sample_m3 = defined(sample_m3);
  const at::NoGradGuard no_grad;
  return plain_margin(margins, target_angle);
}

std::tuple<at::Tensor, at::Tensor> with_hardest_op(
    const at::Tensor& other_lse,
    const at::Tensor& logit_sum,
    const at::Tensor& hardest_logit,
    double scale,
    double hardest_margin) {
  const OtherSums sums = with_hardest({other_lse, logit_sum}, hardest_logit, scale, hardest_margin);
  return {sums.other_lse, sums.logit_sum};
}

struct Loss {
  LinearProblem problem;
  ForwardResult result;
  at::Tensor value;
};

Loss linear_loss(TORCHMARGIN_LINEAR_PARAMETERS, TORCHMARGIN_HARDEST_PARAMETERS, TORCHMARGIN_LOSS_PARAMETERS) {
  constexpr std::string_view op = "linear_margin_cross_entropy";
  const LinearProblem problem = make_linear_problem(op, TORCHMARGIN_LINEAR_ARGUMENTS, hardest);
  check_hardest_margin(op, problem, hardest_margin);
  refuse_no_classes(op, problem);
  const CrossEntropyOptions options = make_cross_entropy_options(op, TORCHMARGIN_LOSS_ARGUMENTS);
  check_class_weight(op, class_weight, input, problem.classes(), label_smoothing);
  const ForwardResult result = call_linear_forward(
      problem,
      {.ignore_index = ignore_index,
       .with_logit_sum = label_smoothing > 0,
       .kept_classes = choose_kept_classes(problem)});
  const OtherSums merged =
      with_hardest({result.other_lse, result.logit_sum}, result.hardest_logit, scale, hardest_margin);
  return {
      problem, result,
      cross_entropy(
          merged.other_lse, result.target_logit, merged.logit_sum, target, problem.classes(), problem.acc(), options)};
}

at::Tensor linear_margin_cross_entropy(
    TORCHMARGIN_LINEAR_PARAMETERS,
    TORCHMARGIN_HARDEST_PARAMETERS,
    TORCHMARGIN_LOSS_PARAMETERS) {
  return linear_loss(TORCHMARGIN_LINEAR_ARGUMENTS, TORCHMARGIN_HARDEST_ARGUMENTS, TORCHMARGIN_LOSS_ARGUMENTS).value;
}

// Each row's logit of its own class without the margin, [B] acc; any number where `valid` is false.
at::Tensor plain_target_logit(const LinearProblem& problem, const at::Tensor& angle, const at::Tensor& valid) {
  const auto norms = [&](const at::Tensor& rows) {
    return at::linalg_vector_norm(rows, 2, /*dim=*/at::IntArrayRef{1}, /*keepdim=*/false, problem.acc());
  };
  at::Tensor logit = problem.margins.parameters.scale * angle.cos();
  const at::Tensor target = at::where(valid, problem.target, at::zeros({}, problem.target.options()));
  if (!problem.normalize_input) {
    logit = logit * norms(problem.input);
  }
  if (!problem.normalize_weight) { // and so no sub-centers
    logit = logit * norms(problem.weight.index_select(0, target));
  }
  return problem.bias.has_value() ? logit + problem.bias->index_select(0, target) : logit;
}

// The loss and means over the rows that are not ignored: B x D work beside the same sweep.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_margin_cross_entropy_statistics(
    TORCHMARGIN_LINEAR_PARAMETERS,
    TORCHMARGIN_HARDEST_PARAMETERS,
    TORCHMARGIN_LOSS_PARAMETERS) {
  const Loss loss =
      linear_loss(TORCHMARGIN_LINEAR_ARGUMENTS, TORCHMARGIN_HARDEST_ARGUMENTS, TORCHMARGIN_LOSS_ARGUMENTS);
  const at::NoGradGuard no_grad;
  const at::Tensor valid = target.ne(ignore_index);
  const at::Tensor count = valid.sum();
  const at::Tensor zero = at::zeros({}, loss.result.target_angle.options());
  const auto mean = [&](const at::Tensor& rows) { return at::where(valid, rows, zero).sum() / count; };
  const at::Tensor right = plain_target_logit(loss.problem, loss.result.target_angle, valid)
                               .gt(loss.result.max_other_logit)
                               .to(zero.scalar_type());
  return {loss.value, mean(loss.result.target_angle), mean(right), mean(loss.result.max_other_logit)};
}

// What one block of classes among others (of this rank's or of other ranks') finds for every row; a row's own class may
// be in another block. `calls`: the forwards whose backward will come, this one among them.
PartialsTuple linear_margin_partials(TORCHMARGIN_LINEAR_PARAMETERS, TORCHMARGIN_PARTIALS_PARAMETERS) {
  constexpr std::string_view op = "_linear_margin_partials";
  const LinearProblem problem = make_linear_problem(op, TORCHMARGIN_LINEAR_ARGUMENTS, hardest);
  demand_threshold(op, problem);
  TORCH_CHECK(calls > 0, op, ": expected calls to be positive, but got ", calls);
  check_coefficient_values(problem, /*all_finite=*/with_logit_sum);
  const ForwardResult r = call_linear_forward(
      problem,
      {.ignore_index = std::nullopt,
       .with_logit_sum = with_logit_sum,
       .kept_classes = choose_kept_classes(problem, calls)});
  at::Tensor plain_logit = at::zeros_like(r.target_angle);
  if (with_plain_logit && weight.sym_size(0) > 0) {
    const at::NoGradGuard no_grad;
    const at::Tensor present = target.ge(0).logical_and(target.lt(problem.classes()));
    plain_logit = at::where(present, plain_target_logit(problem, r.target_angle, present), plain_logit);
  }
  return {r.other_lse,       r.target_logit, r.logit_sum,     r.target_angle,
          r.max_other_logit, plain_logit,    r.hardest_logit, r.hardest_class};
}

at::Tensor margin_logits(
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& given_target,
    TORCHMARGIN_LINEAR_OPTION_PARAMETERS,
    TORCHMARGIN_HARDEST_PARAMETERS) {
  check_given("margin_logits", "input", input);
  const at::Tensor target = given_target.has_value() && given_target->defined()
      ? *given_target
      : at::full_symint({input.dim() > 0 ? input.sym_size(0) : 0}, -1, input.options().dtype(at::kLong));
  const LinearProblem problem = make_linear_problem("margin_logits", TORCHMARGIN_LINEAR_ARGUMENTS, hardest);
  check_hardest_margin("margin_logits", problem, hardest_margin);
  refuse_no_classes("margin_logits", problem);
  return problem.plain() ? call_logits_forward(problem).logits : head_logits(problem, hardest_margin);
}

TORCH_LIBRARY_IMPL(torchmargin, CompositeImplicitAutograd, library) {
  library.impl("linear_margin_lse", linear_margin_lse);
  library.impl("linear_margin_lse_hardest", linear_margin_lse_hardest);
  library.impl("linear_target_angle", linear_target_angle);
  library.impl("_linear_target_angle", wide_target_angle);
  library.impl("_plain_margin", plain_margin_op);
  library.impl("_with_hardest", with_hardest_op);
  library.impl("linear_margin_cross_entropy", linear_margin_cross_entropy);
  library.impl("margin_logits", margin_logits);
  library.impl("_linear_margin_partials", linear_margin_partials);
  library.impl("_linear_margin_cross_entropy_statistics", linear_margin_cross_entropy_statistics);
}

} // namespace
} // namespace torchmargin
