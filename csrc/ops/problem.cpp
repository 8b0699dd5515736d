#include "ops/problem.h"

#include <c10/util/Exception.h>

#include <cmath>

#include "ops/find_op.h"
#include "ops/numbers.h"
#include "plan/chunk_plan.h"

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

void check_sub_centers(std::string_view op, const LinearProblem& problem) {
  const int64_t centers = problem.sub_centers;
  TORCH_CHECK(
      centers >= 1 && centers <= kMostCenters, op, ": expected sub_centers in [1, ", kMostCenters, "], but got ",
      centers);
  if (centers == 1) {
    return;
  }
  TORCH_CHECK(
      problem.normalize_weight, op, ": expected normalize_weight with sub_centers > 1, the nearest of a class's ",
      centers, " centers is the one with the largest cosine");
  TORCH_CHECK(
      problem.weight.sym_size(0) % centers == 0, op, ": expected weight to hold ", centers,
      " rows for each class (sub_centers), but got shape ", problem.weight.sym_sizes());
}

// A tensor that says how hard negatives change: [B, more...] or one for all rows.
void check_hard_numbers(
    std::string_view op,
    const char* argument,
    const at::Tensor& numbers,
    const LinearProblem& problem,
    at::IntArrayRef of_row) {
  check_floating(op, argument, numbers);
  check_device(op, argument, numbers, problem.input);
  std::vector<c10::SymInt> one(of_row.begin(), of_row.end());
  std::vector<c10::SymInt> rows{problem.input.sym_size(0)};
  rows.insert(rows.end(), one.begin(), one.end());
  TORCH_CHECK(
      numbers.sym_sizes() == c10::SymIntArrayRef(one) || numbers.sym_sizes() == c10::SymIntArrayRef(rows), op,
      ": expected ", argument, " to have shape ", c10::SymIntArrayRef(rows), " or ", c10::SymIntArrayRef(one),
      ", but got ", numbers.sym_sizes());
  const at::ScalarType dtype = numbers.scalar_type();
  TORCH_CHECK(
      dtype == at::kDouble || dtype == problem.acc(), op, ": expected ", argument, " to be ",
      problem.acc() == at::kDouble ? "Double" : "Float or Double", ", but got ", dtype);
  TORCH_CHECK(
      !wants_gradient(numbers), op, ": expected ", argument,
      " not to require grad, there is no gradient to it; detach it");
}

void check_binary(std::string_view op, const LinearProblem& problem) {
  const BinaryForm& form = problem.binary;
  if (!problem.one_against_all()) {
    return;
  }
  TORCH_CHECK(std::isfinite(form.margin), op, ": expected margin to be finite, but got ", form.margin);
  TORCH_CHECK(
      std::isfinite(form.power) && form.power >= 1, op, ": expected power to be finite and at least 1, but got ",
      form.power);
  TORCH_CHECK(
      form.kind != BinaryKind::before || form.power == std::floor(form.power), op,
      ": expected a whole power with kind 'm', whose cosine may be below -1 with its margin, but got ", form.power);
}

void check_hard_negatives(std::string_view op, const LinearProblem& problem) {
  TORCH_CHECK(problem.hardest >= 0, op, ": expected hardest not to be negative, but got ", problem.hardest);
  TORCH_CHECK(
      problem.hardest == 0 || !problem.bias.has_value(), op,
      ": expected no bias with hardest, the hardest classes are those with the largest products; got hardest = ",
      problem.hardest);
  if (!problem.hard_coefficients.has_value()) {
    TORCH_CHECK(
        !problem.hard_threshold.has_value(), op,
        ": expected hard_coefficients with hard_threshold, they say what happens to a hard negative");
    return;
  }
  check_hard_numbers(op, "hard_coefficients", *problem.hard_coefficients, problem, {3});
  if (problem.hard_threshold.has_value()) {
    check_hard_numbers(op, "hard_threshold", *problem.hard_threshold, problem, {});
  }
  TORCH_CHECK(
      problem.normalize_input && problem.normalize_weight, op,
      ": expected normalize_input and normalize_weight with hard_coefficients, they change cosines");
  TORCH_CHECK(
      problem.hardest == 0, op,
      ": expected hard_coefficients or hardest, but got both, with hardest = ", problem.hardest);
}

void check(std::string_view op, const LinearProblem& problem) {
  check_parameters(op, problem.margins.parameters);
  check_matrices(op, problem.input, problem.weight);
  check_sub_centers(op, problem);
  check_target(op, problem.target, problem.input);
  if (problem.bias.has_value()) {
    check_like_input(op, "bias", *problem.bias, problem.input);
    TORCH_CHECK(
        problem.bias->dim() == 0 || !problem.one_against_all(), op, ": expected bias to be 0-dimensional, but got ",
        problem.bias->sym_sizes());
    TORCH_CHECK(
        problem.one_against_all() || (problem.bias->dim() == 1 && problem.bias->sym_size(0) == problem.classes()), op,
        ": expected bias to have shape [", problem.classes(), "], but got ", problem.bias->sym_sizes());
  }
  check_margins(op, problem.margins, problem.input);
  check_hard_negatives(op, problem);
  check_binary(op, problem);
  check_compute_dtype(op, problem);
}

// NB: all fields of a problem: a new one does not compile until it is among the tensors or the numbers.
template <typename Problem, typename Visitor>
void visit_numbers(Problem& problem, Visitor& visit) {
  auto& [input, weight, target, bias, margins, normalize_input, normalize_weight, compute_dtype, sub_centers, hard_threshold, hard_coefficients, hardest, binary] =
      problem;
  visit_numbers_of_margin(margins.parameters, visit);
  visit(normalize_input);
  visit(normalize_weight);
  visit(compute_dtype);
  visit(sub_centers);
  visit(hardest);
  visit(binary.kind);
  visit(binary.margin);
  visit(binary.power);
}

} // namespace

LinearProblem make_linear_problem(std::string_view op, TORCHMARGIN_LINEAR_PARAMETERS, int64_t hardest) {
  const LinearProblem problem{
      .input = input,
      .weight = weight,
      .target = target,
      .bias = defined(bias),
      .margins = make_margins(op, TORCHMARGIN_MARGINS_ARGUMENTS),
      .normalize_input = normalize_input,
      .normalize_weight = normalize_weight,
      .compute_dtype = compute_dtype,
      .sub_centers = sub_centers,
      .hard_threshold = defined(hard_threshold),
      .hard_coefficients = defined(hard_coefficients),
      .hardest = hardest,
      .binary = {}};
  check(op, problem);
  return problem;
}

LinearProblem make_linear_problem(std::string_view op, TORCHMARGIN_PACKED_LINEAR_PARAMETERS) {
  const LinearProblem problem = unpack_linear_problem(TORCHMARGIN_PACKED_LINEAR_ARGUMENTS);
  check(op, problem);
  return problem;
}

void check_problem(std::string_view op, const LinearProblem& problem) {
  check(op, problem);
}

c10::SymInt weight_sum_size(const LinearProblem& problem, bool with_logit_sum) {
  if (problem.one_against_all()) {
    return problem.input.sym_size(0);
  }
  return with_logit_sum && problem.sub_centers == 1 ? problem.input.sym_size(1) : c10::SymInt(0);
}

void refuse_no_classes(std::string_view op, const LinearProblem& problem) {
  TORCH_CHECK(
      problem.weight.sym_size(0) > 0, op, ": expected weight to hold at least one class, but got shape ",
      problem.weight.sym_sizes());
}

LinearProblem unpack_linear_problem(TORCHMARGIN_PACKED_LINEAR_PARAMETERS) {
  LinearProblem problem;
  problem.input = input;
  problem.weight = weight;
  problem.target = target;
  problem.bias = defined(bias);
  problem.margins.sample_m2 = defined(sample_m2);
  problem.margins.sample_m3 = defined(sample_m3);
  problem.margins.sample_margin_weight = defined(sample_margin_weight);
  problem.hard_threshold = defined(hard_threshold);
  problem.hard_coefficients = defined(hard_coefficients);
  NumberReader reader(numbers);
  visit_numbers(problem, reader);
  reader.finish();
  return problem;
}

std::vector<double> numbers_of(const LinearProblem& problem) {
  NumberWriter writer;
  visit_numbers(problem, writer);
  return std::move(writer.numbers);
}

namespace {

void check_inverse_norms(std::string_view op, const LinearProblem& problem, const at::Tensor& inverse_norms) {
  const c10::SymInt rows = problem.normalize_weight ? problem.weight.sym_size(0) : c10::SymInt(0);
  check_returned(op, "inverse_norms", inverse_norms, problem.input, {rows}, problem.acc());
}

void check_row_state(std::string_view op, const LinearProblem& problem, const at::Tensor& row_state) {
  check_returned(op, "row_state", row_state, problem.input, {problem.input.sym_size(0), kRowStateSize}, at::kDouble);
}

} // namespace

void check_request(std::string_view op, const LinearProblem& problem, const ForwardRequest& request) {
  TORCH_CHECK(
      request.kept_classes >= 0 && (request.kept_classes == 0 || problem.classes() >= request.kept_classes), op,
      ": expected kept_classes in [0, ", problem.classes(), "], but got ", request.kept_classes);
  if (request.row_state.has_value()) {
    check_row_state(op, problem, *request.row_state);
  }
}

void check_request(std::string_view op, const LinearProblem& problem, const BackwardRequest& request) {
  const ForwardRecord& record = request.record;
  const c10::SymInt rows = problem.input.sym_size(0);
  const c10::SymInt classes = problem.classes();
  check_upstream(op, "grad_other_lse", request.grad_other_lse, problem.input, {rows});
  check_upstream(op, "grad_target_logit", request.grad_target_logit, problem.input, {rows});
  check_upstream(op, "grad_logit_sum", request.grad_logit_sum, problem.input, {rows});
  check_upstream(op, "grad_hardest_logit", request.grad_hardest_logit, problem.input, {rows, problem.hardest});
  check_returned(op, "other_lse", request.other_lse, problem.input, {rows}, at::kDouble);
  check_returned(op, "hardest_class", request.hardest_class, problem.input, {rows, problem.hardest}, at::kLong);
  check_inverse_norms(op, problem, record.inverse_norms);
  TORCH_CHECK(
      record.kept.dim() == 2 && record.kept.sym_size(0) == rows &&
          (record.kept.sym_size(1) <= classes || record.kept.sym_size(1) == kept_columns(classes, classes)),
      op, ": expected kept to have shape [", rows, ", at most ", classes, "], but got ", record.kept.sym_sizes());
  check_returned(op, "kept", record.kept, problem.input, record.kept.sym_sizes(), problem.acc());
  check_returned(
      op, "winners", record.winners, problem.input,
      {rows, problem.sub_centers == 1 ? c10::SymInt(0) : record.kept.sym_size(1)}, at::kByte);
  if (request.grad_logit_sum.has_value() || problem.one_against_all()) {
    check_returned(
        op, "weight_sum", record.weight_sum, problem.input, {weight_sum_size(problem, /*with_logit_sum=*/true)},
        at::kDouble);
  }
  check_row_state(op, problem, record.row_state);
  check_returned(
      op, "weight_scale", record.weight_scale, problem.input, {problem.normalize_weight ? 0 : 1}, at::kDouble);
}

void check_request(std::string_view op, const LinearProblem& problem, const LogitsBackwardRequest& request) {
  check_upstream(
      op, "grad_logits", request.grad_logits, problem.input, {problem.input.sym_size(0), problem.weight.sym_size(0)});
  check_inverse_norms(op, problem, request.inverse_norms);
  check_row_state(op, problem, request.row_state);
}

ForwardTuple to_tuple(const ForwardResult& r) {
  return {r.other_lse,         r.target_logit,     r.logit_sum,          r.hardest_logit,  r.target_angle,
          r.max_other_logit,   r.hardest_class,    r.record.kept,        r.record.winners, r.record.inverse_norms,
          r.record.weight_sum, r.record.row_state, r.record.weight_scale};
}

BackwardTuple to_tuple(const Gradients& g) {
  return {g[0], g[1], g[2], g[3], g[4]};
}

LogitsTuple to_tuple(const LogitsResult& r) {
  return {r.logits, r.inverse_norms, r.row_state};
}

namespace {

// Calls a private op with a problem's arguments and `more`.
template <typename Op, typename... More>
auto call(const Op& op, const LinearProblem& p, const More&... more) {
  return op.call(
      p.input, p.weight, p.bias, p.margins.sample_m2, p.margins.sample_m3, p.target, p.margins.sample_margin_weight,
      p.hard_threshold, p.hard_coefficients, numbers_of(p), more...);
}

Gradients to_gradients(const BackwardTuple& tuple) {
  return std::apply([](const auto&... gradient) { return Gradients{gradient...}; }, tuple);
}

} // namespace

ForwardResult call_linear_forward(const LinearProblem& p, const ForwardRequest& request) {
  static const auto op =
      find_op<ForwardTuple(TORCHMARGIN_PACKED_LINEAR_PARAMETERS, TORCHMARGIN_FORWARD_REQUEST_PARAMETERS)>(
          "torchmargin::_linear_margin_forward");
  auto
      [other_lse, target_logit, logit_sum, hardest_logit, target_angle, max_other_logit, hardest_class, kept, winners,
       inverse_norms, weight_sum, row_state, weight_scale] =
          call(op, p, request.ignore_index, request.with_logit_sum, request.kept_classes, request.row_state);
  return {other_lse,     target_logit,
          logit_sum,     hardest_logit,
          target_angle,  max_other_logit,
          hardest_class, {kept, winners, inverse_norms, weight_sum, row_state, weight_scale}};
}

Gradients call_linear_backward(const LinearProblem& p, const BackwardRequest& request) {
  static const auto op =
      find_op<BackwardTuple(TORCHMARGIN_PACKED_LINEAR_PARAMETERS, TORCHMARGIN_BACKWARD_REQUEST_PARAMETERS)>(
          "torchmargin::_linear_margin_backward");
  return to_gradients(call(
      op, p, request.grad_other_lse, request.grad_target_logit, request.grad_logit_sum, request.grad_hardest_logit,
      request.other_lse, request.hardest_class, request.record.kept, request.record.winners,
      request.record.inverse_norms, request.record.weight_sum, request.record.row_state, request.record.weight_scale,
      request.wanted));
}

TargetTuple call_target_rows(const LinearProblem& p) {
  static const auto op = find_op<TargetTuple(TORCHMARGIN_PACKED_LINEAR_PARAMETERS)>("torchmargin::_linear_target_rows");
  return call(op, p);
}

LogitsResult call_logits_forward(const LinearProblem& p) {
  static const auto op =
      find_op<LogitsTuple(TORCHMARGIN_PACKED_LINEAR_PARAMETERS)>("torchmargin::_margin_logits_forward");
  auto [logits, inverse_norms, row_state] = call(op, p);
  return {logits, inverse_norms, row_state};
}

Gradients call_logits_backward(const LinearProblem& p, const LogitsBackwardRequest& request) {
  static const auto op =
      find_op<BackwardTuple(TORCHMARGIN_PACKED_LINEAR_PARAMETERS, TORCHMARGIN_LOGITS_BACKWARD_REQUEST_PARAMETERS)>(
          "torchmargin::_margin_logits_backward");
  return to_gradients(call(op, p, request.grad_logits, request.inverse_norms, request.row_state, request.wanted));
}

} // namespace torchmargin
