/// @file
/// The base of the loss modules: class weights [C, D] and the call of the fused op; never the logits [B, C]. The
/// published losses are in modules.h.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/types.h>

#include <optional>
#include <ostream>
#include <utility>

#include "torchmargin/export.h"
#include "torchmargin/functional.h"
#include "torchmargin/options.h"

namespace torchmargin::nn {

using functional::MarginStatistics;

/// Margins that differ from row to row, [B] each; margin_weight may be 0-dim. See LinearMarginFuncOptions.
struct SampleMargins {
  std::optional<torch::Tensor> m2;
  std::optional<torch::Tensor> m3;
  std::optional<torch::Tensor> margin_weight;
};

namespace detail {

/// c10::Error if a loss with these options could not be called: the op's own checks, on an empty batch.
TORCHMARGIN_API void check_options(const MarginLossOptions& options);
TORCHMARGIN_API functional::LinearMarginCrossEntropyFuncOptions
call_options(const MarginLossOptions& options, const torch::Tensor& bias, const SampleMargins& margins);
/// Xavier-uniform weights, as ArcFace's and SphereFace's code has them; the bias 0.
TORCHMARGIN_API void initialize(const torch::Tensor& weight, const torch::Tensor& bias);
TORCHMARGIN_API void print(std::ostream& stream, const std::string& name, const MarginLossOptions& options);

} // namespace detail

/// loss->forward(embeddings [B, D], labels [B] int64) is the loss, a scalar (or [B] with reduction "none") in float64
/// for float64 weights and float32 otherwise. Bad options and inputs throw c10::Error, a label outside [0, C) that is
/// not ignore_index c10::IndexError. A loss of your own: derive from MarginLossImpl<YourLossImpl>, call reset() in the
/// constructor, give the margin as options or override sample_margins; TORCH_MODULE(YourLoss).
template <typename Derived>
class TORCHMARGIN_API MarginLossImpl : public torch::nn::Cloneable<Derived> {
 public:
  explicit MarginLossImpl(const MarginLossOptions& margin_loss_options) : margin_loss_options_(margin_loss_options) {
    detail::check_options(margin_loss_options_);
  }

  void reset() override {
    const auto& o = margin_loss_options_;
    weight = this->register_parameter("weight", torch::empty({o.num_classes(), o.in_features()}));
    bias = this->register_parameter("bias", o.bias() ? torch::empty({o.num_classes()}) : torch::Tensor(), o.bias());
    reset_parameters();
  }

  void reset_parameters() {
    detail::initialize(weight, bias);
  }

  torch::Tensor forward(const torch::Tensor& embeddings, const torch::Tensor& labels) {
    const auto options = prepare(embeddings, labels);
    return finish(functional::linear_margin_cross_entropy(embeddings, weight, labels, options), embeddings, labels);
  }

  /// The same, and how training goes, from the same sweep over the classes.
  std::pair<torch::Tensor, MarginStatistics> forward_with_statistics(
      const torch::Tensor& embeddings,
      const torch::Tensor& labels) {
    const auto options = prepare(embeddings, labels);
    auto [loss, statistics] =
        functional::linear_margin_cross_entropy_with_statistics(embeddings, weight, labels, options);
    return {finish(loss, embeddings, labels), statistics};
  }

  /// The logits [B, C] without a margin, for inference: their argmax is the predicted class.
  torch::Tensor logits(const torch::Tensor& embeddings) const {
    const LossForm& form = margin_loss_options_.form();
    MarginParameters plain;
    plain.scale = form.margin.scale;
    const auto options = detail::call_options(margin_loss_options_, bias, {}).linear();
    return functional::margin_logits(
        embeddings, weight, std::nullopt, functional::LinearMarginFuncOptions(options).margin(plain));
  }

  void pretty_print(std::ostream& stream) const override {
    detail::print(stream, this->name(), margin_loss_options_);
  }

  /// The options in the form that all losses share.
  const MarginLossOptions& margin_loss_options() const {
    return margin_loss_options_;
  }

  torch::Tensor weight; ///< [C, D]
  torch::Tensor bias; ///< [C], or undefined

 protected:
  /// The dtype of losses and of margins of rows.
  torch::Dtype acc_dtype() const {
    return weight.scalar_type() == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
  }

  /// Before each forward; of the training state, what a step moves.
  virtual void begin_forward() {}
  virtual SampleMargins sample_margins(const torch::Tensor& /*embeddings*/, const torch::Tensor& /*labels*/) {
    return {};
  }
  /// What is added to the loss.
  virtual torch::Tensor
  finish(const torch::Tensor& loss, const torch::Tensor& /*embeddings*/, const torch::Tensor& /*labels*/) {
    return loss;
  }

 private:
  functional::LinearMarginCrossEntropyFuncOptions prepare(
      const torch::Tensor& embeddings,
      const torch::Tensor& labels) {
    begin_forward();
    return detail::call_options(margin_loss_options_, bias, sample_margins(embeddings, labels));
  }

  MarginLossOptions margin_loss_options_;
};

} // namespace torchmargin::nn
