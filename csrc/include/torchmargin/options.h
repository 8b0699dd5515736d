/// @file
/// Options of the loss modules, in the manner of torch::nn: ArcFaceLossOptions(512, 10575).scale(64).margin(0.5).
/// Angles are in radians. The formulas and papers stand beside the modules, in modules.h. A module's options are live:
/// loss->options.margin(0.1) counts from the next call on. Only sizes and bias belong to the weight and stay.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>

#include <cstdint>
#include <string>

#include "torchmargin/export.h"
#include "torchmargin/margin.h"

namespace torchmargin::nn {

/// What every loss takes: sizes, and torch::nn::CrossEntropyLoss's options with its defaults.
#define TORCHMARGIN_LOSS_OPTIONS(Name)                                                                     \
 public:                                                                                                   \
  Name(int64_t in_features, int64_t num_classes) : in_features_(in_features), num_classes_(num_classes) {} \
  /* D, the size of an embedding. */                                                                       \
  TORCH_ARG(int64_t, in_features);                                                                         \
  /* C. */                                                                                                 \
  TORCH_ARG(int64_t, num_classes);                                                                         \
  /* In [0, 1]. */                                                                                         \
  TORCH_ARG(double, label_smoothing) = 0.0;                                                                \
  /* Rows with this label count for nothing. */                                                            \
  TORCH_ARG(int64_t, ignore_index) = -100;                                                                 \
  /* "none", "mean" or "sum". */                                                                           \
  TORCH_ARG(std::string, reduction) = "mean"

/// How a published margin may be varied: see margin.h.
#define TORCHMARGIN_MARGIN_OPTIONS(extension_default, gradient_default) \
  TORCH_ARG(Extension, extension) = Extension::extension_default;       \
  TORCH_ARG(MarginGradient, margin_gradient) = MarginGradient::gradient_default

/// How a margin grows: lambda = max(lambda_min, lambda_base / (1 + lambda_gamma step)); both 0: the whole from the
/// start.
#define TORCHMARGIN_ANNEALING_OPTIONS(base_default, gamma_default, min_default) \
  TORCH_ARG(double, lambda_base) = base_default;                                \
  TORCH_ARG(double, lambda_gamma) = gamma_default;                              \
  TORCH_ARG(double, lambda_min) = min_default

/// What all losses come down to, and what one of your own starts from.
struct TORCHMARGIN_API MarginLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(MarginLossOptions);
  TORCH_ARG(LossForm, form);
  TORCH_ARG(bool, bias) = false;
};

struct TORCHMARGIN_API SoftmaxLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(SoftmaxLossOptions);
  TORCH_ARG(double, scale) = 1.0;
  TORCH_ARG(bool, bias) = true;
};

struct TORCHMARGIN_API ModifiedSoftmaxLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(ModifiedSoftmaxLossOptions);
  TORCH_ARG(double, scale) = 1.0;
};

struct TORCHMARGIN_API NormalizedSoftmaxLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(NormalizedSoftmaxLossOptions);
  TORCH_ARG(double, scale) = 64.0;
};

struct TORCHMARGIN_API SphereFaceLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(SphereFaceLossOptions);
  TORCH_ARG(double, scale) = 1.0;
  TORCH_ARG(double, margin) = 4.0; ///< multiplies the angle
  TORCH_ARG(bool, normalize_input) = false;
  TORCHMARGIN_MARGIN_OPTIONS(monotonic, exact);
  TORCHMARGIN_ANNEALING_OPTIONS(1000.0, 0.12, 5.0);

 public:
  /// SphereFace-R: Liu et al., "SphereFace Revived", TPAMI 2022 (arXiv:2109.05565).
  static SphereFaceLossOptions normalized(int64_t in_features, int64_t num_classes) {
    SphereFaceLossOptions options(in_features, num_classes);
    options.scale(30.0).margin(1.5).normalize_input(true).margin_gradient(MarginGradient::straight_through);
    return options.lambda_base(0.0).lambda_gamma(0.0).lambda_min(0.0);
  }
};

struct TORCHMARGIN_API LargeMarginSoftmaxLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(LargeMarginSoftmaxLossOptions);
  TORCH_ARG(double, scale) = 1.0;
  TORCH_ARG(double, margin) = 4.0; ///< multiplies the angle
  TORCHMARGIN_MARGIN_OPTIONS(monotonic, exact);
  TORCHMARGIN_ANNEALING_OPTIONS(0.0, 0.12, 0.0);
};

struct TORCHMARGIN_API CosFaceLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(CosFaceLossOptions);
  TORCH_ARG(double, scale) = 64.0;
  TORCH_ARG(double, margin) = 0.35; ///< a difference of cosines
  TORCHMARGIN_MARGIN_OPTIONS(none, exact);
  /// Instead of margin: one of each class, [C] float without a gradient.
  TORCH_ARG(at::Tensor, class_margins);
};

struct TORCHMARGIN_API ArcFaceLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(ArcFaceLossOptions);
  TORCH_ARG(double, scale) = 64.0;
  TORCH_ARG(double, margin) = 0.5; ///< radians
  TORCHMARGIN_MARGIN_OPTIONS(linear, exact);
  /// Instead of margin: one of each class, [C] float without a gradient.
  TORCH_ARG(at::Tensor, class_margins);
};

struct TORCHMARGIN_API CombinedMarginLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(CombinedMarginLossOptions);
  TORCH_ARG(double, scale) = 64.0;
  TORCH_ARG(double, m1) = 1.0;
  TORCH_ARG(double, m2) = 0.3; ///< radians
  TORCH_ARG(double, m3) = 0.2;
  TORCHMARGIN_MARGIN_OPTIONS(none, exact);
};

struct TORCHMARGIN_API AdaFaceLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(AdaFaceLossOptions);
  TORCH_ARG(double, scale) = 64.0;
  TORCH_ARG(double, margin) = 0.4;
  TORCH_ARG(double, h) = 0.333;
  TORCH_ARG(double, momentum) = 0.01; ///< of the newest batch in the running statistics
};

struct TORCHMARGIN_API MagFaceLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(MagFaceLossOptions);
  TORCH_ARG(double, scale) = 64.0;
  TORCH_ARG(double, a_min) = 10.0; ///< lengths
  TORCH_ARG(double, a_max) = 110.0;
  TORCH_ARG(double, m_min) = 0.45; ///< radians, the margins at these lengths
  TORCH_ARG(double, m_max) = 0.8;
  TORCH_ARG(double, regularizer) = 35.0;
};

struct TORCHMARGIN_API ElasticFaceLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(ElasticFaceLossOptions);
  TORCH_ARG(double, scale) = 64.0;
  TORCH_ARG(std::string, kind) = "arc"; ///< the margin is added to the angle; "cos": taken from the cosine
  TORCH_ARG(double, margin) = 0.5;
  TORCH_ARG(double, deviation) = 0.0125;
};

#undef TORCHMARGIN_LOSS_OPTIONS
#undef TORCHMARGIN_MARGIN_OPTIONS
#undef TORCHMARGIN_ANNEALING_OPTIONS

} // namespace torchmargin::nn
