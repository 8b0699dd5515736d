#include "ops/problem.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include <cmath>

namespace torchmargin {
namespace {

struct Name {
  std::string_view text;
  int value;
};
constexpr std::array<Name, 5> kExtensions{
    {{"none", int(Extension::none)},
     {"linear", int(Extension::linear)},
     {"easy", int(Extension::easy)},
     {"clip", int(Extension::clip)},
     {"monotonic", int(Extension::monotonic)}}};
constexpr std::array<Name, 2> kMarginGradients{
    {{"exact", int(MarginGradient::exact)}, {"straight_through", int(MarginGradient::straight_through)}}};

template <typename Enum, size_t N>
Enum parse(std::string_view op, const char* argument, std::string_view text, const std::array<Name, N>& names) {
  std::string known;
  for (const Name& name : names) {
    if (name.text == text) {
      return static_cast<Enum>(name.value);
    }
    known += (known.empty() ? "'" : ", '") + std::string(name.text) + "'";
  }
  TORCH_CHECK(false, op, ": expected ", argument, " to be one of ", known, ", but got '", text, "'");
}

void check_finite(std::string_view op, const char* argument, double value) {
  TORCH_CHECK(std::isfinite(value), op, ": expected ", argument, " to be finite, but got ", value);
}

void check_parameters(std::string_view op, const MarginParameters& margin) {
  check_finite(op, "scale", margin.scale);
  check_finite(op, "m1", margin.m1);
  check_finite(op, "m2", margin.m2);
  check_finite(op, "m3", margin.m3);
  TORCH_CHECK(margin.scale > 0, op, ": expected scale > 0, but got ", margin.scale);
  TORCH_CHECK(margin.m1 > 0, op, ": expected m1 > 0, but got ", margin.m1);
  TORCH_CHECK(
      margin.margin_weight >= 0 && margin.margin_weight <= 1, op, ": expected margin_weight in [0, 1], but got ",
      margin.margin_weight);
  TORCH_CHECK(
      margin.m1 == 1.0 || (margin.extension != Extension::linear && margin.extension != Extension::easy), op,
      ": expected m1 = 1 with extension '", extension_name(margin.extension), "', but got m1 = ", margin.m1);
}

void check_floating(std::string_view op, const char* argument, const at::Tensor& tensor) {
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK(
      dtype == at::kDouble || dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op, ": expected ",
      argument, " to be float64, float32, bfloat16 or float16, but got ", dtype);
}

void check_device(std::string_view op, const char* argument, const at::Tensor& tensor, const at::Tensor& input) {
  TORCH_CHECK(
      tensor.device() == input.device(), op, ": expected ", argument, " on the device of input, ", input.device(),
      ", but got ", tensor.device());
  TORCH_CHECK(
      tensor.layout() == at::kStrided, op, ": expected ", argument, " to be a dense tensor, but got layout ",
      tensor.layout());
}

void check_like_input(std::string_view op, const char* argument, const at::Tensor& tensor, const at::Tensor& input) {
  check_floating(op, argument, tensor);
  check_device(op, argument, tensor, input);
  TORCH_CHECK(
      tensor.scalar_type() == input.scalar_type(), op, ": expected ", argument, " to have the dtype of input, ",
      input.scalar_type(), ", but got ", tensor.scalar_type());
}

void check_matrices(std::string_view op, const at::Tensor& input, const at::Tensor& weight) {
  check_floating(op, "input", input);
  check_device(op, "input", input, input);
  TORCH_CHECK(input.dim() == 2, op, ": expected input to have shape [B, D], but got ", input.sym_sizes());
  check_like_input(op, "weight", weight, input);
  TORCH_CHECK(
      weight.dim() == 2 && weight.sym_size(1) == input.sym_size(1), op, ": expected weight to have shape [C, ",
      input.sym_size(1), "], but got ", weight.sym_sizes());
  TORCH_CHECK(
      weight.sym_size(0) > 0, op, ": expected weight to hold at least one class, but got shape ", weight.sym_sizes());
  TORCH_CHECK(input.sym_size(1) > 0, op, ": expected at least one feature, but got input of shape ", input.sym_sizes());
}

void check_target(std::string_view op, const at::Tensor& target, const at::Tensor& input) {
  check_device(op, "target", target, input);
  TORCH_CHECK(
      target.scalar_type() != at::kInt, op,
      ": expected target to be int64, but got int32; convert it with target.long()");
  TORCH_CHECK(
      target.scalar_type() == at::kLong, op, ": expected target to be class indices of dtype int64, but got ",
      target.scalar_type());
  TORCH_CHECK(
      target.dim() == 1 && target.sym_size(0) == input.sym_size(0), op, ": expected target to have shape [",
      input.sym_size(0), "], but got ", target.sym_sizes());
}

void check_sample(
    std::string_view op,
    const char* argument,
    const at::Tensor& sample,
    const at::Tensor& input,
    bool scalar_allowed) {
  check_floating(op, argument, sample);
  check_device(op, argument, sample, input);
  const bool row_wise = sample.dim() == 1 && sample.sym_size(0) == input.sym_size(0);
  TORCH_CHECK(
      row_wise || (scalar_allowed && sample.dim() == 0), op, ": expected ", argument, " to have shape [",
      input.sym_size(0), "]", scalar_allowed ? " or to be 0-dimensional" : "", ", but got ", sample.sym_sizes());
  const at::ScalarType acc = acc_dtype(input.scalar_type());
  TORCH_CHECK(
      sample.scalar_type() == acc || sample.scalar_type() == input.scalar_type(), op, ": expected ", argument,
      " to be ", acc, acc == input.scalar_type() ? "" : " or to have the dtype of input", ", but got ",
      sample.scalar_type());
}

bool wants_gradient(const std::optional<at::Tensor>& tensor) {
  return c10::GradMode::is_enabled() && tensor.has_value() && tensor->requires_grad();
}

void check_samples(std::string_view op, const LinearProblem& problem) {
  const bool straight = problem.margin.margin_gradient == MarginGradient::straight_through;
  for (const auto& [argument, sample] :
       {std::pair{"sample_m2", &problem.sample_m2}, std::pair{"sample_m3", &problem.sample_m3}}) {
    if (sample->has_value()) {
      check_sample(op, argument, **sample, problem.input, /*scalar_allowed=*/false);
      TORCH_CHECK(
          !(straight && wants_gradient(*sample)), op, ": expected ", argument,
          " not to require grad with margin_gradient 'straight_through', which gives it none; detach it or use "
          "'exact'");
    }
  }
  if (problem.sample_margin_weight.has_value()) {
    check_sample(op, "sample_margin_weight", *problem.sample_margin_weight, problem.input, /*scalar_allowed=*/true);
    TORCH_CHECK(
        !wants_gradient(problem.sample_margin_weight), op,
        ": expected sample_margin_weight not to require grad, there is no gradient to it; detach it");
  }
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

// An undefined tensor in an optional (as C++ callers may pass it) is no tensor.
std::optional<at::Tensor> defined(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() ? tensor : std::nullopt;
}

} // namespace

std::string_view extension_name(Extension extension) {
  return kExtensions[static_cast<size_t>(extension)].text;
}

std::string_view margin_gradient_name(MarginGradient margin_gradient) {
  return kMarginGradients[static_cast<size_t>(margin_gradient)].text;
}

at::ScalarType acc_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

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
  problem.margin = {
      scale,
      m1,
      m2,
      m3,
      parse<Extension>(op, "extension", extension, kExtensions),
      margin_weight,
      parse<MarginGradient>(op, "margin_gradient", margin_gradient, kMarginGradients)};
  problem.normalize_input = normalize_input;
  problem.normalize_weight = normalize_weight;
  problem.compute_dtype = compute_dtype;

  check_parameters(op, problem.margin);
  check_matrices(op, input, weight);
  check_target(op, target, input);
  if (problem.bias.has_value()) {
    check_like_input(op, "bias", *problem.bias, input);
    TORCH_CHECK(
        problem.bias->dim() == 1 && problem.bias->sym_size(0) == weight.sym_size(0), op,
        ": expected bias to have shape [", weight.sym_size(0), "], but got ", problem.bias->sym_sizes());
  }
  check_samples(op, problem);
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

ForwardResult call_linear_forward(const LinearProblem& p, const ForwardRequest& request) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("torchmargin::_linear_margin_forward", "")
          .typed<ForwardTuple(TORCHMARGIN_LINEAR_PARAMETERS, std::optional<int64_t>, bool, int64_t)>();
  auto [other_lse, target_logit, logit_sum, target_angle, max_other_logit, kept, inverse_norms, weight_sum] = op.call(
      p.input, p.weight, p.target, p.bias, p.margin.scale, p.margin.m1, p.margin.m2, p.margin.m3, p.sample_m2,
      p.sample_m3, p.sample_margin_weight, extension_name(p.margin.extension), p.margin.margin_weight,
      margin_gradient_name(p.margin.margin_gradient), p.normalize_input, p.normalize_weight, p.compute_dtype,
      request.ignore_index, request.with_logit_sum, request.kept_classes);
  return {other_lse, target_logit, logit_sum, target_angle, max_other_logit, kept, inverse_norms, weight_sum};
}

Gradients call_linear_backward(const LinearProblem& p, const BackwardRequest& request) {
  using OptionalTensor = const std::optional<at::Tensor>&;
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("torchmargin::_linear_margin_backward", "")
          .typed<BackwardTuple(
              TORCHMARGIN_LINEAR_PARAMETERS, OptionalTensor, OptionalTensor, OptionalTensor, const at::Tensor&,
              const at::Tensor&, const at::Tensor&, const at::Tensor&, std::array<bool, 5>)>();
  auto [input, weight, bias, sample_m2, sample_m3] = op.call(
      p.input, p.weight, p.target, p.bias, p.margin.scale, p.margin.m1, p.margin.m2, p.margin.m3, p.sample_m2,
      p.sample_m3, p.sample_margin_weight, extension_name(p.margin.extension), p.margin.margin_weight,
      margin_gradient_name(p.margin.margin_gradient), p.normalize_input, p.normalize_weight, p.compute_dtype,
      request.grad_other_lse, request.grad_target_logit, request.grad_logit_sum, request.other_lse, request.kept,
      request.inverse_norms, request.weight_sum, request.wanted);
  return {input, weight, bias, sample_m2, sample_m3};
}

} // namespace torchmargin
