#include "torchmargin/class_parallel.h"

#include <c10/util/Exception.h>

#include "distributed/class_parallel.h"
#include "ops/find_op.h"
#include "ops/margins.h"

namespace torchmargin::nn::functional {

at::Tensor class_parallel_cross_entropy(
    const at::Tensor& input,
    at::TensorList weights,
    at::IntArrayRef class_starts,
    const at::Tensor& target,
    int64_t num_classes,
    const ClassParallelOptions& options) {
  static const auto op =
      find_op<at::Tensor(TORCHMARGIN_CLASS_PARALLEL_PARAMETERS)>("torchmargin::class_parallel_cross_entropy");
  const LinearMarginCrossEntropyFuncOptions& loss = options.loss();
  const LinearMarginFuncOptions& linear = loss.linear();
  TORCH_CHECK(
      !linear.bias().has_value(),
      "class_parallel_cross_entropy: expected biases, one for each weight, instead of the loss's own bias");
  const MarginParameters& margin = linear.margin();
  return op.call(
      input, weights, class_starts, target, num_classes, options.group_name(), options.group_size(), options.biases(),
      margin.scale, margin.m1, margin.m2, margin.m3, linear.sample_m2(), linear.sample_m3(),
      linear.sample_margin_weight(), extension_name(margin.extension), margin.margin_weight,
      margin_gradient_name(margin.margin_gradient), linear.normalize_input(), linear.normalize_weight(),
      linear.compute_dtype(), linear.sub_centers(), linear.hard_threshold(), linear.hard_coefficients(),
      linear.hardest(), linear.hardest_margin(), loss.label_smoothing(), loss.ignore_index(), loss.reduction(),
      loss.class_weight(), options.max_rows(), options.input_grad_scale());
}

at::Tensor class_parallel_binary_cross_entropy(
    const at::Tensor& input,
    at::TensorList weights,
    at::IntArrayRef class_starts,
    const at::Tensor& target,
    int64_t num_classes,
    const ClassParallelBinaryOptions& options) {
  static const auto op = find_op<at::Tensor(TORCHMARGIN_CLASS_PARALLEL_BINARY_PARAMETERS)>(
      "torchmargin::class_parallel_binary_cross_entropy");
  const LinearMarginBinaryCrossEntropyFuncOptions& loss = options.loss();
  return op.call(
      input, weights, class_starts, target, num_classes, options.group_name(), options.group_size(), loss.bias(),
      loss.scale(), loss.margin(), loss.kind(), loss.power(), loss.positive_weight(), loss.negative_weight(),
      loss.sub_centers(), loss.compute_dtype(), loss.ignore_index(), loss.reduction(), loss.require_target(),
      loss.class_weight(), options.max_rows(), options.input_grad_scale());
}

} // namespace torchmargin::nn::functional
