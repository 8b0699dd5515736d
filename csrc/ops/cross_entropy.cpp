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
    const CrossEntropyOptions& options) {
  // NB: ignored rows are replaced before and after the arithmetic. Once would let
  // 0 * NaN through to the gradients of an ignored row that holds NaN.
  const at::Tensor valid = target.ne(options.ignore_index);
  const at::Tensor zero = at::zeros({}, other_lse.options());
  const at::Tensor own = at::where(valid, target_logit, zero);
  const at::Tensor gap = at::where(valid, other_lse, zero) - own;
  // NB: softplus(o - t) by logaddexp: F.softplus becomes the identity above 20, and
  // lse - t has no digit left where the loss is small.
  at::Tensor loss = at::logaddexp(zero, gap);
  if (options.label_smoothing > 0) {
    const at::Tensor mean_logit = at::where(valid, logit_sum, zero).div(at::Scalar(classes));
    loss = loss + options.label_smoothing * (own - mean_logit);
  }
  return {valid, reduce(at::where(valid, loss, zero), valid, options.reduction)};
}

} // namespace torchmargin
