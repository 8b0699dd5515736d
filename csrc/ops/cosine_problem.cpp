#include "ops/cosine_problem.h"

#include <c10/util/Exception.h>

#include "ops/find_op.h"
#include "ops/numbers.h"

namespace torchmargin {
namespace {

void check_cosine(std::string_view op, const at::Tensor& cosine) {
  check_floating(op, "cosine", cosine);
  check_device(op, "cosine", cosine, cosine);
}

void check(std::string_view op, const CosineProblem& problem) {
  const at::Tensor& cosine = problem.cosine;
  check_parameters(op, problem.margins.parameters);
  check_cosine(op, cosine);
  TORCH_CHECK(
      cosine.dim() == 2 && cosine.sym_size(1) > 0, op, ": expected cosine to have shape [B, C] with C > 0, but got ",
      cosine.sym_sizes());
  check_target(op, problem.target, cosine);
  check_margins(op, problem.margins, cosine);
}

void check(std::string_view op, const at::Tensor& cosine, const MarginParameters& margin) {
  check_parameters(op, margin);
  check_cosine(op, cosine);
}

} // namespace

CosineProblem make_cosine_problem(std::string_view op, TORCHMARGIN_COSINE_PARAMETERS) {
  const CosineProblem problem{cosine, target, make_margins(op, TORCHMARGIN_MARGINS_ARGUMENTS)};
  check(op, problem);
  return problem;
}

CosineProblem make_cosine_problem(std::string_view op, TORCHMARGIN_PACKED_COSINE_PARAMETERS) {
  const CosineProblem problem = unpack_cosine_problem(TORCHMARGIN_PACKED_COSINE_ARGUMENTS);
  check(op, problem);
  return problem;
}

CosineProblem unpack_cosine_problem(TORCHMARGIN_PACKED_COSINE_PARAMETERS) {
  return {
      cosine, target, {unpack_margin(numbers), defined(sample_m2), defined(sample_m3), defined(sample_margin_weight)}};
}

std::vector<double> numbers_of(const CosineProblem& problem) {
  return numbers_of(problem.margins.parameters);
}

MarginParameters make_transform(std::string_view op, TORCHMARGIN_TRANSFORM_PARAMETERS) {
  const MarginParameters margin{
      .m1 = m1,
      .m2 = m2,
      .m3 = m3,
      .extension = parse_extension(op, extension),
      .margin_weight = margin_weight,
      .margin_gradient = parse_margin_gradient(op, margin_gradient)};
  check(op, cosine, margin);
  return margin;
}

MarginParameters make_transform(std::string_view op, const at::Tensor& cosine, at::ArrayRef<double> numbers) {
  const MarginParameters margin = unpack_margin(numbers);
  check(op, cosine, margin);
  return margin;
}

MarginParameters unpack_margin(at::ArrayRef<double> numbers) {
  MarginParameters margin;
  NumberReader reader(numbers);
  visit_numbers_of_margin(margin, reader);
  reader.finish();
  return margin;
}

std::vector<double> numbers_of(const MarginParameters& margin) {
  NumberWriter writer;
  visit_numbers_of_margin(margin, writer);
  return std::move(writer.numbers);
}

void check_request(std::string_view op, const CosineProblem& problem, const CosineBackwardRequest& request) {
  check_upstream(op, "grad_other_lse", request.grad_other_lse, problem.cosine, {problem.cosine.sym_size(0)});
  check_upstream(op, "grad_target_logit", request.grad_target_logit, problem.cosine, {problem.cosine.sym_size(0)});
  check_upstream(op, "grad_logit_sum", request.grad_logit_sum, problem.cosine, {problem.cosine.sym_size(0)});
  check_returned(op, "other_lse", request.other_lse, problem.cosine, {problem.cosine.sym_size(0)}, at::kDouble);
}

CosineResult call_cosine_forward(const CosineProblem& p, std::optional<int64_t> ignore_index, bool with_logit_sum) {
  static const auto op = find_op<CosineTuple(TORCHMARGIN_PACKED_COSINE_PARAMETERS, std::optional<int64_t>, bool)>(
      "torchmargin::_margin_cosine_forward");
  auto [other_lse, target_logit, logit_sum] = op.call(
      p.cosine, p.margins.sample_m2, p.margins.sample_m3, p.target, p.margins.sample_margin_weight, numbers_of(p),
      ignore_index, with_logit_sum);
  return {other_lse, target_logit, logit_sum};
}

CosineGradients call_cosine_backward(const CosineProblem& p, const CosineBackwardRequest& request) {
  static const auto op =
      find_op<CosineTuple(TORCHMARGIN_PACKED_COSINE_PARAMETERS, TORCHMARGIN_COSINE_BACKWARD_REQUEST_PARAMETERS)>(
          "torchmargin::_margin_cosine_backward");
  auto [cosine, sample_m2, sample_m3] = op.call(
      p.cosine, p.margins.sample_m2, p.margins.sample_m3, p.target, p.margins.sample_margin_weight, numbers_of(p),
      request.grad_other_lse, request.grad_target_logit, request.grad_logit_sum, request.other_lse, request.wanted);
  return {cosine, sample_m2, sample_m3};
}

at::Tensor call_transform(const at::Tensor& cosine, at::ArrayRef<double> numbers) {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, at::ArrayRef<double>)>("torchmargin::_margin_transform_forward");
  return op.call(cosine, numbers);
}

at::Tensor call_transform_backward(const at::Tensor& grad, const at::Tensor& cosine, at::ArrayRef<double> numbers) {
  static const auto op = find_op<at::Tensor(const at::Tensor&, const at::Tensor&, at::ArrayRef<double>)>(
      "torchmargin::_margin_transform_backward");
  return op.call(grad, cosine, numbers);
}

} // namespace torchmargin
