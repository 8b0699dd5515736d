#include "ops/class_weight.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/util/Exception.h>

#include "ops/checks.h"

namespace torchmargin {

void check_class_weight(
    std::string_view op,
    const std::optional<at::Tensor>& class_weight,
    const at::Tensor& input,
    const c10::SymInt& classes,
    double label_smoothing) {
  const std::optional<at::Tensor> weight = defined(class_weight);
  if (!weight.has_value()) {
    return;
  }
  TORCH_CHECK(
      weight->is_floating_point(), op, ": expected class_weight to hold floating-point numbers, but got ",
      weight->scalar_type());
  TORCH_CHECK(
      weight->dim() == 1 && weight->sym_size(0) == classes, op, ": expected class_weight to have shape [", classes,
      "], but got ", weight->sym_sizes());
  TORCH_CHECK(
      weight->device() == input.device(), op, ": expected class_weight on ", input.device(), ", but got ",
      weight->device());
  TORCH_CHECK(
      !weight->requires_grad(), op,
      ": expected class_weight not to require grad, there is no gradient to it; detach "
      "it");
  TORCH_CHECK(
      label_smoothing == 0, op,
      ": expected no label_smoothing with class_weight: cross_entropy weighs the smoothed classes one by one, which "
      "takes a weighted sum of all logits that the fused op does not make");
}

at::Tensor row_weights(const at::Tensor& class_weight, const at::Tensor& target, int64_t ignore_index) {
  const at::Tensor valid = target.ne(ignore_index);
  const at::Tensor place = at::where(valid, target, at::zeros({}, target.options()));
  const at::Tensor of_rows = class_weight.index_select(0, place).to(at::kDouble);
  return at::where(valid, of_rows, at::zeros({}, of_rows.options()));
}

at::Tensor weighted_loss(
    const at::Tensor& losses,
    const at::Tensor& class_weight,
    const at::Tensor& target,
    int64_t ignore_index,
    Reduction reduction) {
  const at::Tensor weights = row_weights(class_weight, target, ignore_index);
  const at::Tensor weighted = weights * losses;
  if (reduction == Reduction::none) {
    return weighted;
  }
  return reduction == Reduction::mean ? weighted.sum() / weights.sum() : weighted.sum();
}

} // namespace torchmargin
