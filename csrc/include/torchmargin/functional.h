/// @file
/// The fused linear margin ops for LibTorch programs, in the manner of torch::nn::functional.
///
///   namespace F = torchmargin::nn::functional;
///   auto loss = F::linear_margin_cross_entropy(
///       embeddings, weight, labels, F::LinearMarginCrossEntropyFuncOptions(presets::arcface()));
///
/// Shapes: input [B, D], weight [C, D], target [B] int64, bias [C]. Results are float64 for
/// float64 inputs and float32 otherwise. Angles and m2 are in radians. Bad arguments throw
/// c10::Error. Gradients are those of the ops: input, weight, bias, sample_m2, sample_m3.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "torchmargin/export.h"
#include "torchmargin/presets.h"

namespace torchmargin::nn::functional {

/// What the linear ops share. Start from a preset, or from no margin at all.
struct TORCHMARGIN_API LinearMarginFuncOptions {
  LinearMarginFuncOptions() = default;
  /* implicit */ LinearMarginFuncOptions(const LossForm& form)
      : margin_(form.margin), normalize_input_(form.normalize_input), normalize_weight_(form.normalize_weight) {}

  TORCH_ARG(MarginParameters, margin);
  TORCH_ARG(bool, normalize_input) = true;
  TORCH_ARG(bool, normalize_weight) = true;
  /// Added to the logits, [C].
  TORCH_ARG(std::optional<at::Tensor>, bias) = std::nullopt;
  /// Added to m2 and m3 of each row, [B]; may require grad. float64 beside any dtype, or acc, or the inputs' dtype.
  TORCH_ARG(std::optional<at::Tensor>, sample_m2) = std::nullopt;
  TORCH_ARG(std::optional<at::Tensor>, sample_m3) = std::nullopt;
  /// Multiplies margin_weight, 0-dim or [B], dtypes as above; has no gradient.
  TORCH_ARG(std::optional<at::Tensor>, sample_margin_weight) = std::nullopt;
  /// The lowest precision allowed for the products of float32 inputs.
  TORCH_ARG(std::optional<at::ScalarType>, compute_dtype) = std::nullopt;
  /// K: weight is [C K, D], and a class's cosine is the largest of its K (Deng et al., ECCV 2020). At most 255.
  TORCH_ARG(int64_t, sub_centers) = 1;
  /// Another class with a cosine c above the threshold ([B] or 0-dim; none: the row's own cos(m1 theta + m2) - m3) gets
  /// a c^2 + b c + d in its place; coefficients [3] or [B, 3] are (a, b, d). float64 or acc, without gradients.
  TORCH_ARG(std::optional<at::Tensor>, hard_threshold) = std::nullopt;
  TORCH_ARG(std::optional<at::Tensor>, hard_coefficients) = std::nullopt;
  /// The so many hardest other classes of each row get cos(max(theta_j - hardest_margin, 0)), radians.
  TORCH_ARG(int64_t, hardest) = 0;
  TORCH_ARG(double, hardest_margin) = 0.0;
};

struct TORCHMARGIN_API LinearMarginCrossEntropyFuncOptions {
  LinearMarginCrossEntropyFuncOptions() = default;
  /* implicit */ LinearMarginCrossEntropyFuncOptions(LinearMarginFuncOptions linear) : linear_(std::move(linear)) {}
  /* implicit */ LinearMarginCrossEntropyFuncOptions(const LossForm& form) : linear_(form) {}

  TORCH_ARG(LinearMarginFuncOptions, linear);
  /// In [0, 1].
  TORCH_ARG(double, label_smoothing) = 0.0;
  /// Rows with this target count for nothing.
  TORCH_ARG(int64_t, ignore_index) = -100;
  /// "none", "mean" or "sum".
  TORCH_ARG(std::string, reduction) = "mean";
  /// [C] floating-point numbers without a gradient, as torch::nn::functional::cross_entropy's weight: a row counts as
  /// much as its class, and "mean" divides by the sum of the rows' weights. Without label_smoothing alone.
  TORCH_ARG(std::optional<at::Tensor>, class_weight) = std::nullopt;
};

/// The core op's results, [B] each. A target outside [0, C) is absent from this weight:
/// target_logit and target_angle are then 0, the other two count all C classes. A weight without classes gives
/// other_lse and max_other_logit -inf and the others 0.
struct LinearMarginLse {
  at::Tensor other_lse; ///< log sum exp over j != y of z_ij
  at::Tensor target_logit; ///< with its margin
  at::Tensor logit_sum; ///< target_logit + sum over j != y of z_ij
  at::Tensor target_angle; ///< radians; never requires grad
  at::Tensor max_other_logit; ///< never requires grad
};

TORCHMARGIN_API LinearMarginLse linear_margin_lse(
    const at::Tensor& input,
    const at::Tensor& weight,
    const at::Tensor& target,
    const LinearMarginFuncOptions& options = {});

/// The same, with the options.hardest() largest other logits of each row apart from other_lse: [B, k], the larger and
/// then the lower class first, without a margin; -infinity and -1 where there is no other class. Any rule about the k
/// hardest is then arithmetic on [B, k]; hardest_logit has gradients.
struct LinearMarginLseHardest {
  LinearMarginLse lse;
  at::Tensor hardest_logit;
  at::Tensor hardest_class;
};
TORCHMARGIN_API LinearMarginLseHardest linear_margin_lse_hardest(
    const at::Tensor& input,
    const at::Tensor& weight,
    const at::Tensor& target,
    const LinearMarginFuncOptions& options);

/// The angle of each row to its class, [B], in radians; 0 where it is absent. It has no gradient.
TORCHMARGIN_API at::Tensor linear_target_angle(
    const at::Tensor& input,
    const at::Tensor& weight,
    const at::Tensor& target,
    int64_t sub_centers = 1);

/// Cross-entropy of the logits with the target's margin; a scalar, or [B] with reduction "none".
TORCHMARGIN_API at::Tensor linear_margin_cross_entropy(
    const at::Tensor& input,
    const at::Tensor& weight,
    const at::Tensor& target,
    const LinearMarginCrossEntropyFuncOptions& options = {});

/// How training goes: means over the rows that are not ignored, 0-dim, never requiring grad.
struct MarginStatistics {
  at::Tensor target_angle; ///< radians
  at::Tensor accuracy; ///< share of rows whose class has the largest logit, all without a margin
  at::Tensor hardest_negative_logit; ///< the largest logit of another class
};

/// The same loss, and the statistics from the same sweep over the classes.
TORCHMARGIN_API std::pair<at::Tensor, MarginStatistics> linear_margin_cross_entropy_with_statistics(
    const at::Tensor& input,
    const at::Tensor& weight,
    const at::Tensor& target,
    const LinearMarginCrossEntropyFuncOptions& options = {});

/// One against all: for each class a logistic loss of a curve through its cosine; embeddings and weights are
/// normalised.
///
///   positive_weight softplus(-(scale P + bias)) + negative_weight sum_{j != y} softplus(scale N(c_j) + bias)
///
/// With g(c) = 2 ((c + 1) / 2)^power - 1, kind "c": P = g(cos(theta)) - margin, N = g + margin; "a" (radians): P =
/// g(cos(theta + margin)), N = g(cos(theta_j - margin)); "m": P = g(cos(theta) - margin), N = g. SphereFace2 (Wen et
/// al., ICLR 2022) and UniFace (Zhou et al., ICCV 2023). A target outside [0, C) is absent: the row has negatives only.
struct TORCHMARGIN_API LinearMarginBinaryCrossEntropyFuncOptions {
  TORCH_ARG(double, scale) = 1.0;
  TORCH_ARG(double, margin) = 0.0;
  TORCH_ARG(std::string, kind) = "c";
  /// At least 1, and whole with "m".
  TORCH_ARG(double, power) = 1.0;
  TORCH_ARG(double, positive_weight) = 1.0;
  TORCH_ARG(double, negative_weight) = 1.0;
  /// 0-dim; has a gradient.
  TORCH_ARG(std::optional<at::Tensor>, bias) = std::nullopt;
  TORCH_ARG(int64_t, sub_centers) = 1;
  TORCH_ARG(std::optional<at::ScalarType>, compute_dtype) = std::nullopt;
  TORCH_ARG(int64_t, ignore_index) = -100;
  TORCH_ARG(std::string, reduction) = "mean";
  /// A target that is neither a class nor ignore_index is c10::IndexError instead of a row of negatives alone.
  TORCH_ARG(bool, require_target) = false;
  /// [C] floating-point numbers without a gradient, as torch::nn::functional::cross_entropy's weight: a row counts as
  /// much as its class, and "mean" divides by the sum of the rows' weights. With require_target alone.
  TORCH_ARG(std::optional<at::Tensor>, class_weight) = std::nullopt;
};
TORCHMARGIN_API at::Tensor linear_margin_binary_cross_entropy(
    const at::Tensor& input,
    const at::Tensor& weight,
    const at::Tensor& target,
    const LinearMarginBinaryCrossEntropyFuncOptions& options = {});
TORCHMARGIN_API std::pair<at::Tensor, MarginStatistics> linear_margin_binary_cross_entropy_with_statistics(
    const at::Tensor& input,
    const at::Tensor& weight,
    const at::Tensor& target,
    const LinearMarginBinaryCrossEntropyFuncOptions& options = {});

/// The logits [B, C] themselves; with a target, its column has its margin.
TORCHMARGIN_API at::Tensor margin_logits(
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& target = std::nullopt,
    const LinearMarginFuncOptions& options = {});

/// The loss for given cosines [B, C]. Of options.linear() the margin and the sample_* count.
TORCHMARGIN_API at::Tensor margin_cross_entropy(
    const at::Tensor& cosine,
    const at::Tensor& target,
    const LinearMarginCrossEntropyFuncOptions& options = {});

/// psi of cosines of any shape, elementwise, in their dtype; scale does not count.
TORCHMARGIN_API at::Tensor margin_transform(const at::Tensor& cosine, const MarginParameters& margin);

} // namespace torchmargin::nn::functional
