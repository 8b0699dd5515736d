// Autocast. The linear ops never cast the weight as a whole: the other tensors are brought to
// its dtype (margins of rows to float32, which every narrow weight takes), and for float32
// weights the autocast dtype becomes compute_dtype, the lowest precision allowed for the
// products. The ops on given cosines run in float32.
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "ops/arguments.h"
#include "ops/find_op.h"
#include "ops/problem.h"

namespace torchmargin {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

bool is_narrow(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16;
}

// float64 and integers are left as they are, for the gate to judge.
at::Tensor cast(const at::Tensor& tensor, at::ScalarType dtype) {
  return tensor.defined() && is_narrow(tensor.scalar_type()) && is_narrow(dtype) ? tensor.to(dtype) : tensor;
}

OptionalTensor cast(const OptionalTensor& tensor, at::ScalarType dtype) {
  return tensor.has_value() ? OptionalTensor(cast(*tensor, dtype)) : std::nullopt;
}

// The lowest precision allowed for the products.
std::optional<at::ScalarType>
lowest_dtype(const at::Tensor& input, const at::Tensor& weight, std::optional<at::ScalarType> compute_dtype) {
  if (!compute_dtype.has_value() && weight.defined() && weight.scalar_type() == at::kFloat && input.defined() &&
      is_narrow(input.scalar_type())) {
    return at::autocast::get_autocast_dtype(weight.device().type());
  }
  return compute_dtype;
}

// Calls a linear op below autocast with its tensors cast. `Target` is Tensor or optional Tensor.
template <typename Op, typename Target, typename... More>
auto call_linear(
    const Op& op,
    const at::Tensor& input,
    const at::Tensor& weight,
    const Target& target,
    TORCHMARGIN_LINEAR_OPTION_PARAMETERS,
    More... more) {
  const c10::impl::ExcludeDispatchKeyGuard below(c10::autocast_dispatch_keyset);
  const at::ScalarType dtype = weight.scalar_type();
  const auto lowest = lowest_dtype(input, weight, compute_dtype);
  return op.call(
      cast(input, dtype), weight, target, cast(bias, dtype), scale, m1, m2, m3, cast(sample_m2, at::kFloat),
      cast(sample_m3, at::kFloat), cast(sample_margin_weight, at::kFloat), extension, margin_weight, margin_gradient,
      normalize_input, normalize_weight, lowest, sub_centers, hard_threshold, hard_coefficients, more...);
}

using LseTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using LseHardestTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using LossTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

LseTuple linear_margin_lse_autocast(TORCHMARGIN_LINEAR_PARAMETERS) {
  static const auto op = find_op<LseTuple(TORCHMARGIN_LINEAR_PARAMETERS)>("torchmargin::linear_margin_lse");
  return call_linear(op, TORCHMARGIN_LINEAR_ARGUMENTS);
}

LseHardestTuple linear_margin_lse_hardest_autocast(TORCHMARGIN_LINEAR_PARAMETERS, int64_t hardest) {
  static const auto op =
      find_op<LseHardestTuple(TORCHMARGIN_LINEAR_PARAMETERS, int64_t)>("torchmargin::linear_margin_lse_hardest");
  return call_linear(op, TORCHMARGIN_LINEAR_ARGUMENTS, hardest);
}

at::Tensor linear_margin_cross_entropy_autocast(
    TORCHMARGIN_LINEAR_PARAMETERS,
    TORCHMARGIN_HARDEST_PARAMETERS,
    TORCHMARGIN_LOSS_PARAMETERS) {
  static const auto op =
      find_op<at::Tensor(TORCHMARGIN_LINEAR_PARAMETERS, TORCHMARGIN_HARDEST_PARAMETERS, TORCHMARGIN_LOSS_PARAMETERS)>(
          "torchmargin::linear_margin_cross_entropy");
  return call_linear(op, TORCHMARGIN_LINEAR_ARGUMENTS, TORCHMARGIN_HARDEST_ARGUMENTS, TORCHMARGIN_LOSS_ARGUMENTS);
}

LossTuple linear_margin_cross_entropy_statistics_autocast(
    TORCHMARGIN_LINEAR_PARAMETERS,
    TORCHMARGIN_HARDEST_PARAMETERS,
    TORCHMARGIN_LOSS_PARAMETERS) {
  static const auto op =
      find_op<LossTuple(TORCHMARGIN_LINEAR_PARAMETERS, TORCHMARGIN_HARDEST_PARAMETERS, TORCHMARGIN_LOSS_PARAMETERS)>(
          "torchmargin::_linear_margin_cross_entropy_statistics");
  return call_linear(op, TORCHMARGIN_LINEAR_ARGUMENTS, TORCHMARGIN_HARDEST_ARGUMENTS, TORCHMARGIN_LOSS_ARGUMENTS);
}

template <typename Op, typename... More>
auto call_binary(const Op& op, TORCHMARGIN_BINARY_PARAMETERS, More... more) {
  const c10::impl::ExcludeDispatchKeyGuard below(c10::autocast_dispatch_keyset);
  const at::ScalarType dtype = weight.defined() ? weight.scalar_type() : at::kFloat;
  return op.call(
      cast(input, dtype), weight, target, cast(bias, dtype), scale, margin, kind, power, positive_weight,
      negative_weight, sub_centers, lowest_dtype(input, weight, compute_dtype), ignore_index, reduction, require_target,
      class_weight, more...);
}

at::Tensor linear_margin_binary_cross_entropy_autocast(TORCHMARGIN_BINARY_PARAMETERS) {
  static const auto op =
      find_op<at::Tensor(TORCHMARGIN_BINARY_PARAMETERS)>("torchmargin::linear_margin_binary_cross_entropy");
  return call_binary(op, TORCHMARGIN_BINARY_ARGUMENTS);
}

LossTuple linear_margin_binary_cross_entropy_statistics_autocast(TORCHMARGIN_BINARY_PARAMETERS) {
  static const auto op =
      find_op<LossTuple(TORCHMARGIN_BINARY_PARAMETERS)>("torchmargin::_linear_margin_binary_cross_entropy_statistics");
  return call_binary(op, TORCHMARGIN_BINARY_ARGUMENTS);
}

PartialsTuple linear_margin_binary_partials_autocast(TORCHMARGIN_BINARY_PARAMETERS, int64_t calls) {
  static const auto op =
      find_op<PartialsTuple(TORCHMARGIN_BINARY_PARAMETERS, int64_t)>("torchmargin::_linear_margin_binary_partials");
  return call_binary(op, TORCHMARGIN_BINARY_ARGUMENTS, calls);
}

at::Tensor linear_target_angle_autocast(
    const at::Tensor& input,
    const at::Tensor& weight,
    const at::Tensor& target,
    int64_t sub_centers) {
  static const auto op = find_op<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t)>(
      "torchmargin::linear_target_angle");
  const c10::impl::ExcludeDispatchKeyGuard below(c10::autocast_dispatch_keyset);
  return op.call(weight.defined() ? cast(input, weight.scalar_type()) : input, weight, target, sub_centers);
}

PartialsTuple linear_margin_partials_autocast(TORCHMARGIN_LINEAR_PARAMETERS, TORCHMARGIN_PARTIALS_PARAMETERS) {
  static const auto op = find_op<PartialsTuple(TORCHMARGIN_LINEAR_PARAMETERS, TORCHMARGIN_PARTIALS_PARAMETERS)>(
      "torchmargin::_linear_margin_partials");
  return call_linear(op, TORCHMARGIN_LINEAR_ARGUMENTS, TORCHMARGIN_PARTIALS_ARGUMENTS);
}

at::Tensor margin_logits_autocast(
    const at::Tensor& input,
    const at::Tensor& weight,
    const OptionalTensor& target,
    TORCHMARGIN_LINEAR_OPTION_PARAMETERS,
    TORCHMARGIN_HARDEST_PARAMETERS) {
  static const auto op = find_op<at::Tensor(
      const at::Tensor&, const at::Tensor&, const OptionalTensor&, TORCHMARGIN_LINEAR_OPTION_PARAMETERS,
      TORCHMARGIN_HARDEST_PARAMETERS)>("torchmargin::margin_logits");
  return call_linear(op, TORCHMARGIN_LINEAR_ARGUMENTS, TORCHMARGIN_HARDEST_ARGUMENTS);
}

at::Tensor margin_cross_entropy_autocast(TORCHMARGIN_COSINE_PARAMETERS, TORCHMARGIN_LOSS_PARAMETERS) {
  static const auto op = find_op<at::Tensor(TORCHMARGIN_COSINE_PARAMETERS, TORCHMARGIN_LOSS_PARAMETERS)>(
      "torchmargin::margin_cross_entropy");
  const c10::impl::ExcludeDispatchKeyGuard below(c10::autocast_dispatch_keyset);
  return op.call(
      cast(cosine, at::kFloat), target, scale, m1, m2, m3, cast(sample_m2, at::kFloat), cast(sample_m3, at::kFloat),
      cast(sample_margin_weight, at::kFloat), extension, margin_weight, margin_gradient, TORCHMARGIN_LOSS_ARGUMENTS);
}

at::Tensor margin_transform_autocast(TORCHMARGIN_TRANSFORM_PARAMETERS) {
  static const auto op = find_op<at::Tensor(TORCHMARGIN_TRANSFORM_PARAMETERS)>("torchmargin::margin_transform");
  const c10::impl::ExcludeDispatchKeyGuard below(c10::autocast_dispatch_keyset);
  return op.call(cast(cosine, at::kFloat), m1, m2, m3, extension, margin_weight, margin_gradient);
}

void register_kernels(torch::Library& library) {
  library.impl("linear_margin_lse", linear_margin_lse_autocast);
  library.impl("linear_margin_lse_hardest", linear_margin_lse_hardest_autocast);
  library.impl("linear_margin_binary_cross_entropy", linear_margin_binary_cross_entropy_autocast);
  library.impl(
      "_linear_margin_binary_cross_entropy_statistics", linear_margin_binary_cross_entropy_statistics_autocast);
  library.impl("_linear_margin_binary_partials", linear_margin_binary_partials_autocast);
  library.impl("linear_target_angle", linear_target_angle_autocast);
  library.impl("linear_margin_cross_entropy", linear_margin_cross_entropy_autocast);
  library.impl("_linear_margin_cross_entropy_statistics", linear_margin_cross_entropy_statistics_autocast);
  library.impl("margin_logits", margin_logits_autocast);
  library.impl("_linear_margin_partials", linear_margin_partials_autocast);
  library.impl("margin_cross_entropy", margin_cross_entropy_autocast);
  library.impl("margin_transform", margin_transform_autocast);
}

TORCH_LIBRARY_IMPL(torchmargin, AutocastCPU, library) {
  register_kernels(library);
}

TORCH_LIBRARY_IMPL(torchmargin, AutocastCUDA, library) {
  register_kernels(library);
}

} // namespace
} // namespace torchmargin
