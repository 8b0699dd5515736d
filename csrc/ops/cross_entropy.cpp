#include "ops/cross_entropy.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/util/Exception.h>

namespace torchmargin {
namespace {

Reduction parse_reduction(std::string_view op, std::string_view text) {
  if (text == "none") {
    return Reduction::none;
  }
  if (text == "mean") {
    return Reduction::mean;
  }
  TORCH_CHECK(text == "sum", op, ": expected reduction to be one of 'none', 'mean', 'sum', but got '", text, "'");
  return Reduction::sum;
}

at::Tensor reduce(const at::Tensor& loss, const at::Tensor& valid, Reduction reduction) {
  switch (reduction) {
    case Reduction::none:
      return loss;
    case Reduction::sum:
      return loss.sum();
    case Reduction::mean:
      return loss.sum() / valid.sum();
  }
  TORCH_INTERNAL_ASSERT(false);
}

} // namespace

CrossEntropyOptions make_cross_entropy_options(
    std::string_view op,
    double label_smoothing,
    int64_t ignore_index,
    std::string_view reduction) {
  TORCH_CHECK(
      label_smoothing >= 0 && label_smoothing <= 1, op, ": expected label_smoothing in [0, 1], but got ",
      label_smoothing);
  return {label_smoothing, ignore_index, parse_reduction(op, reduction)};
}

CrossEntropy cross_entropy(
    const at::Tensor& other_lse,
    const at::Tensor& target_logit,
    const at::Tensor& logit_sum,
    const at::Tensor& target,
    const c10::SymInt& classes,
    at::ScalarType acc,
    const CrossEntropyOptions& options) {
  std::optional<at::Tensor> mean_logit;
  if (options.label_smoothing > 0) {
    mean_logit = logit_sum.div(at::Scalar(classes));
  }
  const at::Tensor loss =
      call_row_loss(other_lse, target_logit, mean_logit, target, options.label_smoothing, options.ignore_index);
  const at::Tensor valid = target.ne(options.ignore_index);
  return {valid, reduce(loss, valid, options.reduction).to(acc)};
}

} // namespace torchmargin
