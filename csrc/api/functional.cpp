// The C++ front door: options in, a dispatcher call of the public op, results out.
#include "torchmargin/functional.h"

#include <tuple>

#include "ops/arguments.h"
#include "ops/find_op.h"
#include "ops/margins.h"

namespace torchmargin::nn::functional {
namespace {

using LseTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// `Target`: Tensor or optional Tensor. Calls `op` with the shared arguments that the options hold, and `more`.
template <typename Op, typename Target, typename... More>
auto call(
    const Op& op,
    const at::Tensor& input,
    const at::Tensor& weight,
    const Target& target,
    const LinearMarginFuncOptions& options,
    More... more) {
  const MarginParameters& margin = options.margin();
  return op.call(
      input, weight, target, options.bias(), margin.scale, margin.m1, margin.m2, margin.m3, options.sample_m2(),
      options.sample_m3(), options.sample_margin_weight(), extension_name(margin.extension), margin.margin_weight,
      margin_gradient_name(margin.margin_gradient), options.normalize_input(), options.normalize_weight(),
      options.compute_dtype(), options.sub_centers(), options.hard_threshold(), options.hard_coefficients(), more...);
}

} // namespace

LinearMarginLse linear_margin_lse(
    const at::Tensor& input,
    const at::Tensor& weight,
    const at::Tensor& target,
    const LinearMarginFuncOptions& options) {
  static const auto op = find_op<LseTuple(TORCHMARGIN_LINEAR_PARAMETERS)>("torchmargin::linear_margin_lse");
  auto [other_lse, target_logit, logit_sum, target_angle, max_other_logit] = call(op, input, weight, target, options);
  return {other_lse, target_logit, logit_sum, target_angle, max_other_logit};
}

LinearMarginLseHardest linear_margin_lse_hardest(
    const at::Tensor& input,
    const at::Tensor& weight,
    const at::Tensor& target,
    const LinearMarginFuncOptions& options) {
  using Tuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
  static const auto op =
      find_op<Tuple(TORCHMARGIN_LINEAR_PARAMETERS, int64_t)>("torchmargin::linear_margin_lse_hardest");
  auto [other_lse, target_logit, logit_sum, target_angle, max_other_logit, hardest_logit, hardest_class] =
      call(op, input, weight, target, options, options.hardest());
  return {{other_lse, target_logit, logit_sum, target_angle, max_other_logit}, hardest_logit, hardest_class};
}

at::Tensor
linear_target_angle(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target, int64_t sub_centers) {
  static const auto op = find_op<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t)>(
      "torchmargin::linear_target_angle");
  return op.call(input, weight, target, sub_centers);
}

at::Tensor linear_margin_cross_entropy(
    const at::Tensor& input,
    const at::Tensor& weight,
    const at::Tensor& target,
    const LinearMarginCrossEntropyFuncOptions& options) {
  static const auto op =
      find_op<at::Tensor(TORCHMARGIN_LINEAR_PARAMETERS, TORCHMARGIN_HARDEST_PARAMETERS, TORCHMARGIN_LOSS_PARAMETERS)>(
          "torchmargin::linear_margin_cross_entropy");
  const LinearMarginFuncOptions& linear = options.linear();
  return call(
      op, input, weight, target, linear, linear.hardest(), linear.hardest_margin(), options.label_smoothing(),
      options.ignore_index(), std::string_view(options.reduction()), options.class_weight());
}

std::pair<at::Tensor, MarginStatistics> linear_margin_cross_entropy_with_statistics(
    const at::Tensor& input,
    const at::Tensor& weight,
    const at::Tensor& target,
    const LinearMarginCrossEntropyFuncOptions& options) {
  using Tuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
  static const auto op =
      find_op<Tuple(TORCHMARGIN_LINEAR_PARAMETERS, TORCHMARGIN_HARDEST_PARAMETERS, TORCHMARGIN_LOSS_PARAMETERS)>(
          "torchmargin::_linear_margin_cross_entropy_statistics");
  const LinearMarginFuncOptions& linear = options.linear();
  auto [loss, target_angle, accuracy, hardest_negative_logit] = call(
      op, input, weight, target, linear, linear.hardest(), linear.hardest_margin(), options.label_smoothing(),
      options.ignore_index(), std::string_view(options.reduction()), options.class_weight());
  return {loss, {target_angle, accuracy, hardest_negative_logit}};
}

namespace {

template <typename Op>
auto call_binary(
    const Op& op,
    const at::Tensor& input,
    const at::Tensor& weight,
    const at::Tensor& target,
    const LinearMarginBinaryCrossEntropyFuncOptions& o) {
  return op.call(
      input, weight, target, o.bias(), o.scale(), o.margin(), o.kind(), o.power(), o.positive_weight(),
      o.negative_weight(), o.sub_centers(), o.compute_dtype(), o.ignore_index(), o.reduction(), o.require_target(),
      o.class_weight());
}

} // namespace

at::Tensor linear_margin_binary_cross_entropy(
    const at::Tensor& input,
    const at::Tensor& weight,
    const at::Tensor& target,
    const LinearMarginBinaryCrossEntropyFuncOptions& options) {
  static const auto op =
      find_op<at::Tensor(TORCHMARGIN_BINARY_PARAMETERS)>("torchmargin::linear_margin_binary_cross_entropy");
  return call_binary(op, input, weight, target, options);
}

std::pair<at::Tensor, MarginStatistics> linear_margin_binary_cross_entropy_with_statistics(
    const at::Tensor& input,
    const at::Tensor& weight,
    const at::Tensor& target,
    const LinearMarginBinaryCrossEntropyFuncOptions& options) {
  using Tuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
  static const auto op =
      find_op<Tuple(TORCHMARGIN_BINARY_PARAMETERS)>("torchmargin::_linear_margin_binary_cross_entropy_statistics");
  auto [loss, target_angle, accuracy, hardest_negative_logit] = call_binary(op, input, weight, target, options);
  return {loss, {target_angle, accuracy, hardest_negative_logit}};
}

at::Tensor margin_logits(
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& target,
    const LinearMarginFuncOptions& options) {
  using Signature = at::Tensor(
      const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, TORCHMARGIN_LINEAR_OPTION_PARAMETERS,
      TORCHMARGIN_HARDEST_PARAMETERS);
  static const auto op = find_op<Signature>("torchmargin::margin_logits");
  return call(op, input, weight, target, options, options.hardest(), options.hardest_margin());
}

at::Tensor margin_cross_entropy(
    const at::Tensor& cosine,
    const at::Tensor& target,
    const LinearMarginCrossEntropyFuncOptions& options) {
  static const auto op = find_op<at::Tensor(TORCHMARGIN_COSINE_PARAMETERS, TORCHMARGIN_LOSS_PARAMETERS)>(
      "torchmargin::margin_cross_entropy");
  const LinearMarginFuncOptions& linear = options.linear();
  const MarginParameters& margin = linear.margin();
  return op.call(
      cosine, target, margin.scale, margin.m1, margin.m2, margin.m3, linear.sample_m2(), linear.sample_m3(),
      linear.sample_margin_weight(), extension_name(margin.extension), margin.margin_weight,
      margin_gradient_name(margin.margin_gradient), options.label_smoothing(), options.ignore_index(),
      options.reduction(), options.class_weight());
}

at::Tensor margin_transform(const at::Tensor& cosine, const MarginParameters& margin) {
  static const auto op = find_op<at::Tensor(TORCHMARGIN_TRANSFORM_PARAMETERS)>("torchmargin::margin_transform");
  return op.call(
      cosine, margin.m1, margin.m2, margin.m3, extension_name(margin.extension), margin.margin_weight,
      margin_gradient_name(margin.margin_gradient));
}

} // namespace torchmargin::nn::functional
