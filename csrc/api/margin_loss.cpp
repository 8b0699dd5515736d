// What all loss modules share: checks, the op's options, initial weights, how they print.
#include "torchmargin/margin_loss.h"

#include <ATen/Functions.h>
#include <c10/util/Exception.h>
#include <torch/nn/init.h>

#include "ops/checks.h"

namespace torchmargin::nn::detail {

void check_options(const MarginLossOptions& options) {
  TORCH_CHECK(
      options.in_features() >= 1 && options.num_classes() >= 1,
      "expected in_features and num_classes to be positive, but got ", options.in_features(), " and ",
      options.num_classes());
  // NB: not on the Meta device: without Python many of ATen's ops have no kernel there.
  const at::Tensor nothing = at::empty({0, 1}, at::kFloat);
  const at::Tensor labels = at::empty({0}, nothing.options().dtype(at::kLong));
  functional::linear_margin_cross_entropy(nothing, nothing.new_zeros({1, 1}), labels, call_options(options, {}, {}));
}

functional::LinearMarginCrossEntropyFuncOptions
call_options(const MarginLossOptions& options, const torch::Tensor& bias, const SampleMargins& margins) {
  functional::LinearMarginFuncOptions linear(options.form());
  if (bias.defined()) {
    linear.bias(bias);
  }
  linear.sample_m2(margins.m2).sample_m3(margins.m3).sample_margin_weight(margins.margin_weight);
  functional::LinearMarginCrossEntropyFuncOptions all(linear);
  all.label_smoothing(options.label_smoothing());
  all.ignore_index(options.ignore_index());
  all.reduction(options.reduction());
  return all;
}

void initialize(const torch::Tensor& weight, const torch::Tensor& bias) {
  torch::nn::init::xavier_uniform_(weight);
  if (bias.defined()) {
    torch::nn::init::zeros_(bias);
  }
}

void print(std::ostream& stream, const std::string& name, const MarginLossOptions& options) {
  const MarginParameters& margin = options.form().margin;
  stream << name << "(in_features=" << options.in_features() << ", num_classes=" << options.num_classes()
         << ", scale=" << margin.scale << ", m1=" << margin.m1 << ", m2=" << margin.m2 << ", m3=" << margin.m3
         << ", extension='" << extension_name(margin.extension) << "', margin_gradient='"
         << margin_gradient_name(margin.margin_gradient) << "', label_smoothing=" << options.label_smoothing()
         << ", ignore_index=" << options.ignore_index() << ", reduction='" << options.reduction()
         << "', bias=" << (options.bias() ? "true" : "false") << ")";
}

} // namespace torchmargin::nn::detail
