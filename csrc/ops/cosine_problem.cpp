#include "ops/cosine_problem.h"

#include <c10/util/Exception.h>

#include "ops/find_op.h"

namespace torchmargin {

CosineProblem make_cosine_problem(std::string_view op, TORCHMARGIN_COSINE_PARAMETERS) {
  CosineProblem problem{
      cosine,
      target,
      defined(sample_m2),
      defined(sample_m3),
      defined(sample_margin_weight),
      make_margin_parameters(op, scale, m1, m2, m3, extension, margin_weight, margin_gradient)};
  check_floating(op, "cosine", cosine);
  check_device(op, "cosine", cosine, cosine);
  TORCH_CHECK(
      cosine.dim() == 2 && cosine.sym_size(1) > 0, op, ": expected cosine to have shape [B, C] with C > 0, but got ",
      cosine.sym_sizes());
  check_target(op, target, cosine);
  check_samples(
      op, cosine, problem.margin.margin_gradient, problem.sample_m2, problem.sample_m3, problem.sample_margin_weight);
  return problem;
}

MarginParameters check_transform(std::string_view op, const at::Tensor& cosine, TORCHMARGIN_MARGIN_PARAMETERS) {
  const MarginParameters margin =
      make_margin_parameters(op, /*scale=*/1.0, m1, m2, m3, extension, margin_weight, margin_gradient);
  check_floating(op, "cosine", cosine);
  check_device(op, "cosine", cosine, cosine);
  return margin;
}

CosineResult call_cosine_forward(const CosineProblem& p, std::optional<int64_t> ignore_index, bool with_logit_sum) {
  static const auto op = find_op<CosineTuple(TORCHMARGIN_COSINE_PARAMETERS, std::optional<int64_t>, bool)>(
      "torchmargin::_margin_cosine_forward");
  auto [other_lse, target_logit, logit_sum] = op.call(
      p.cosine, p.target, p.margin.scale, p.margin.m1, p.margin.m2, p.margin.m3, p.sample_m2, p.sample_m3,
      p.sample_margin_weight, extension_name(p.margin.extension), p.margin.margin_weight,
      margin_gradient_name(p.margin.margin_gradient), ignore_index, with_logit_sum);
  return {other_lse, target_logit, logit_sum};
}

CosineGradients call_cosine_backward(const CosineProblem& p, const CosineBackwardRequest& request) {
  static const auto op =
      find_op<CosineTuple(TORCHMARGIN_COSINE_BACKWARD_PARAMETERS)>("torchmargin::_margin_cosine_backward");
  auto [cosine, sample_m2, sample_m3] = op.call(
      p.cosine, p.target, p.margin.scale, p.margin.m1, p.margin.m2, p.margin.m3, p.sample_m2, p.sample_m3,
      p.sample_margin_weight, extension_name(p.margin.extension), p.margin.margin_weight,
      margin_gradient_name(p.margin.margin_gradient), request.grad_other_lse, request.grad_target_logit,
      request.grad_logit_sum, request.other_lse, request.wanted);
  return {cosine, sample_m2, sample_m3};
}

at::Tensor call_transform(const at::Tensor& cosine, const MarginParameters& margin) {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, TORCHMARGIN_MARGIN_PARAMETERS)>("torchmargin::margin_transform");
  return op.call(
      cosine, margin.m1, margin.m2, margin.m3, extension_name(margin.extension), margin.margin_weight,
      margin_gradient_name(margin.margin_gradient));
}

at::Tensor call_transform_backward(const at::Tensor& grad, const at::Tensor& cosine, const MarginParameters& margin) {
  static const auto op = find_op<at::Tensor(const at::Tensor&, const at::Tensor&, TORCHMARGIN_MARGIN_PARAMETERS)>(
      "torchmargin::_margin_transform_backward");
  return op.call(
      grad, cosine, margin.m1, margin.m2, margin.m3, extension_name(margin.extension), margin.margin_weight,
      margin_gradient_name(margin.margin_gradient));
}

} // namespace torchmargin
