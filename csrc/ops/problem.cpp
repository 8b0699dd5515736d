#include "ops/problem.h"

#include <c10/util/Exception.h>

#include "ops/find_op.h"

namespace torchmargin {
namespace {

void check_matrices(std::string_view op, const at::Tensor& input, const at::Tensor& weight) {
  check_floating(op, "input", input);
  check_device(op, "input", input, input);
  TORCH_CHECK(input.dim() == 2, op, ": expected input to have shape [B, D], but got ", input.sym_sizes());
  check_like_input(op, "weight", weight, input);
  TORCH_CHECK(
      weight.dim() == 2 && weight.sym_size(1) == input.sym_size(1), op, ": expected weight to have shape [C, ",
      input.sym_size(1), "], but got ", weight.sym_sizes(), ", for input of shape ", input.sym_sizes(),
      ": both have D features");
  TORCH_CHECK(
      weight.sym_size(0) > 0, op, ": expected weight to hold at least one class, but got shape ", weight.sym_sizes());
  TORCH_CHECK(input.sym_size(1) > 0, op, ": expected at least one feature, but got input of shape ", input.sym_sizes());
}

void check_compute_dtype(std::string_view op, const LinearProblem& problem) {
  if (!problem.compute_dtype.has_value()) {
    return;
  }
  const at::ScalarType dtype = *problem.compute_dtype;
  TORCH_CHECK(
      problem.input.scalar_type() == at::kFloat, op, ": expected no compute_dtype with ", problem.input.scalar_type(),
      " inputs, it is for float32 ones, but got ", dtype);
  TORCH_CHECK(
      dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat, op,
      ": expected compute_dtype to be float16, bfloat16 or float32, but got ", dtype);
}

} // namespace

at::ScalarType LinearProblem::acc() const {
  return acc_dtype(input.scalar_type());
}

LinearProblem make_linear_problem(std::string_view op, TORCHMARGIN_LINEAR_PARAMETERS) {
  LinearProblem problem;
  problem.input = input;
  problem.weight = weight;
  problem.target = target;
  problem.bias = defined(bias);
  problem.sample_m2 = defined(sample_m2);
  problem.sample_m3 = defined(sample_m3);
  problem.sample_margin_weight = defined(sample_margin_weight);
  problem.margin = make_margin_parameters(op, scale, m1, m2, m3, extension, margin_weight, margin_gradient);
  problem.normalize_input = normalize_input;
  problem.normalize_weight = normalize_weight;
  problem.compute_dtype = compute_dtype;

  check_matrices(op, input, weight);
  check_target(op, target, input);
  if (problem.bias.has_value()) {
    check_like_input(op, "bias", *problem.bias, input);
    TORCH_CHECK(
        problem.bias->dim() == 1 && problem.bias->sym_size(0) == weight.sym_size(0), op,
        ": expected bias to have shape [", weight.sym_size(0), "], but got ", problem.bias->sym_sizes());
  }
  check_samples(
      op, input, problem.margin.margin_gradient, problem.sample_m2, problem.sample_m3, problem.sample_margin_weight);
  check_compute_dtype(op, problem);
  return problem;
}

ForwardTuple to_tuple(const ForwardResult& r) {
  return {r.other_lse,       r.target_logit, r.logit_sum,     r.target_angle,
          r.max_other_logit, r.kept,         r.inverse_norms, r.weight_sum};
}

BackwardTuple to_tuple(const Gradients& g) {
  return {g[0], g[1], g[2], g[3], g[4]};
}

namespace {

using OptionalTensor = const std::optional<at::Tensor>&;

// Calls a private op with a problem's arguments and `more`.
template <typename Op, typename... More>
auto call(const Op& op, const LinearProblem& p, const More&... more) {
  return op.call(
      p.input, p.weight, p.target, p.bias, p.margin.scale, p.margin.m1, p.margin.m2, p.margin.m3, p.sample_m2,
      p.sample_m3, p.sample_margin_weight, extension_name(p.margin.extension), p.margin.margin_weight,
      margin_gradient_name(p.margin.margin_gradient), p.normalize_input, p.normalize_weight, p.compute_dtype, more...);
}

Gradients to_gradients(const BackwardTuple& tuple) {
  return std::apply([](const auto&... gradient) { return Gradients{gradient...}; }, tuple);
}

} // namespace

ForwardResult call_linear_forward(const LinearProblem& p, const ForwardRequest& request) {
  static const auto op = find_op<ForwardTuple(TORCHMARGIN_LINEAR_PARAMETERS, std::optional<int64_t>, bool, int64_t)>(
      "torchmargin::_linear_margin_forward");
  auto [other_lse, target_logit, logit_sum, target_angle, max_other_logit, kept, inverse_norms, weight_sum] =
      call(op, p, request.ignore_index, request.with_logit_sum, request.kept_classes);
  return {other_lse, target_logit, logit_sum, target_angle, max_other_logit, kept, inverse_norms, weight_sum};
}

Gradients call_linear_backward(const LinearProblem& p, const BackwardRequest& request) {
  static const auto op = find_op<BackwardTuple(
      TORCHMARGIN_LINEAR_PARAMETERS, OptionalTensor, OptionalTensor, OptionalTensor, const at::Tensor&,
      const at::Tensor&, const at::Tensor&, const at::Tensor&, std::array<bool, 5>)>(
      "torchmargin::_linear_margin_backward");
  return to_gradients(call(
      op, p, request.grad_other_lse, request.grad_target_logit, request.grad_logit_sum, request.other_lse, request.kept,
      request.inverse_norms, request.weight_sum, request.wanted));
}

LogitsResult call_logits_forward(const LinearProblem& p) {
  static const auto op =
      find_op<std::tuple<at::Tensor, at::Tensor>(TORCHMARGIN_LINEAR_PARAMETERS)>("torchmargin::_margin_logits_forward");
  auto [logits, inverse_norms] = call(op, p);
  return {logits, inverse_norms};
}

Gradients call_logits_backward(const LinearProblem& p, const LogitsBackwardRequest& request) {
  static const auto op =
      find_op<BackwardTuple(TORCHMARGIN_LINEAR_PARAMETERS, const at::Tensor&, const at::Tensor&, std::array<bool, 5>)>(
          "torchmargin::_margin_logits_backward");
  return to_gradients(call(op, p, request.grad_logits, request.inverse_norms, request.wanted));
}

} // namespace torchmargin
