// The fused linear margin ops for LibTorch programs, in the manner of torch::nn::functional.
//
//   namespace F = torchmargin::nn::functional;
//   auto loss = F::linear_margin_cross_entropy(
//       embeddings, weight, labels, F::LinearMarginCrossEntropyFuncOptions(presets::arcface()));
//
// Shapes: input [B, D], weight [C, D], target [B] int64, bias [C]. Results are float64 for
// float64 inputs and float32 otherwise. Angles and m2 are in radians. Bad arguments throw
// c10::Error. Gradients are those of the ops: input, weight, bias, sample_m2, sample_m3.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>

#include <cstdint>
#include <optional>
#include <string>

#include "torchmargin/export.h"
#include "torchmargin/margin.h"

namespace torchmargin::nn::functional {

// What the linear ops share. Start from a preset, or from no margin at all.
struct TORCHMARGIN_API LinearMarginFuncOptions {
  LinearMarginFuncOptions() = default;
  /* implicit */ LinearMarginFuncOptions(const LossForm& form)
      : margin_(form.margin), normalize_input_(form.normalize_input), normalize_weight_(form.normalize_weight) {}

  TORCH_ARG(MarginParameters, margin);
  TORCH_ARG(bool, normalize_input) = true;
  TORCH_ARG(bool, normalize_weight) = true;
  // Added to the logits, [C].
  TORCH_ARG(std::optional<at::Tensor>, bias) = std::nullopt;
  // Added to m2 and m3 of each row, [B]; may require grad.
  TORCH_ARG(std::optional<at::Tensor>, sample_m2) = std::nullopt;
  TORCH_ARG(std::optional<at::Tensor>, sample_m3) = std::nullopt;
  // Multiplies margin_weight, 0-dim or [B]; has no gradient.
  TORCH_ARG(std::optional<at::Tensor>, sample_margin_weight) = std::nullopt;
  // The lowest precision allowed for the products of float32 inputs.
  TORCH_ARG(std::optional<at::ScalarType>, compute_dtype) = std::nullopt;
};

struct TORCHMARGIN_API LinearMarginCrossEntropyFuncOptions {
  LinearMarginCrossEntropyFuncOptions() = default;
  /* implicit */ LinearMarginCrossEntropyFuncOptions(LinearMarginFuncOptions linear) : linear_(std::move(linear)) {}
  /* implicit */ LinearMarginCrossEntropyFuncOptions(const LossForm& form) : linear_(form) {}

  TORCH_ARG(LinearMarginFuncOptions, linear);
  // In [0, 1].
  TORCH_ARG(double, label_smoothing) = 0.0;
  // Rows with this target count for nothing.
  TORCH_ARG(int64_t, ignore_index) = -100;
  // "none", "mean" or "sum".
  TORCH_ARG(std::string, reduction) = "mean";
};

// The core op's results, [B] each. A target outside [0, C) is absent from this weight:
// target_logit and target_angle are then 0, the other two count all C classes.
struct LinearMarginLse {
  at::Tensor other_lse; // log sum exp over j != y of z_ij
  at::Tensor target_logit; // with its margin
  at::Tensor logit_sum; // target_logit + sum over j != y of z_ij
  at::Tensor target_angle; // radians; never requires grad
  at::Tensor max_other_logit; // never requires grad
};

TORCHMARGIN_API LinearMarginLse linear_margin_lse(
    const at::Tensor& input,
    const at::Tensor& weight,
    const at::Tensor& target,
    const LinearMarginFuncOptions& options = {});

// Cross-entropy of the logits with the target's margin; a scalar, or [B] with reduction "none".
TORCHMARGIN_API at::Tensor linear_margin_cross_entropy(
    const at::Tensor& input,
    const at::Tensor& weight,
    const at::Tensor& target,
    const LinearMarginCrossEntropyFuncOptions& options = {});

} // namespace torchmargin::nn::functional
