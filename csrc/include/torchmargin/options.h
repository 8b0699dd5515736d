/// @file
/// Options of the loss modules, in the manner of torch::nn: ArcFaceLossOptions(512, 10575).scale(64).margin(0.5).
/// Angles are in radians. The formulas and papers stand beside the modules, in modules.h, the defaults in presets.h. A
/// module's options are live: loss->options.margin(0.1) counts from the next call on. Only sizes and bias belong to the
/// weight and stay.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>

#include <cstdint>
#include <optional>
#include <string>

#include "torchmargin/export.h"
#include "torchmargin/presets.h"

namespace torchmargin::nn {

/// What every loss takes: sizes, and torch::nn::CrossEntropyLoss's options with its defaults.
#define TORCHMARGIN_LOSS_OPTIONS(Name) TORCHMARGIN_LOSS_OPTIONS_OF(Name, 1)
/// The same, with as many centers for a class.
#define TORCHMARGIN_LOSS_OPTIONS_OF(Name, centers)                                                                 \
 public:                                                                                                           \
  Name(int64_t in_features, int64_t num_classes) : in_features_(in_features), num_classes_(num_classes) {}         \
  /* D, the size of an embedding. */                                                                               \
  TORCH_ARG(int64_t, in_features);                                                                                 \
  /* C. */                                                                                                         \
  TORCH_ARG(int64_t, num_classes);                                                                                 \
  /* In [0, 1]. */                                                                                                 \
  TORCH_ARG(double, label_smoothing) = 0.0;                                                                        \
  /* Rows with this label count for nothing. */                                                                    \
  TORCH_ARG(int64_t, ignore_index) = -100;                                                                         \
  /* "none", "mean" or "sum". */                                                                                   \
  TORCH_ARG(std::string, reduction) = "mean";                                                                      \
  /* [C], a weight of each class, as CrossEntropyLoss's weight: finite, not negative, without a gradient. It is */ \
  /* not saved. Losses with a softmax take no label_smoothing beside it. */                                        \
  TORCH_ARG(at::Tensor, class_weight);                                                                             \
  /* K: weights are [C K, D], and a class's cosine is the largest of its K. At most 255. */                        \
  TORCH_ARG(int64_t, sub_centers) = centers;                                                                       \
  /* Other classes with a larger cosine have logit 0 and no gradient, as InsightFace's filter. */                  \
  TORCH_ARG(std::optional<double>, interclass_filter) = std::nullopt

/// How a published margin may be varied: see margin.h.
#define TORCHMARGIN_MARGIN_OPTIONS(Loss)             \
  TORCH_ARG(Extension, extension) = Loss::extension; \
  TORCH_ARG(MarginGradient, margin_gradient) = Loss::margin_gradient

/// How a margin grows: lambda = max(lambda_min, lambda_base / (1 + lambda_gamma step)); both 0: the whole from the
/// start.
#define TORCHMARGIN_ANNEALING_OPTIONS(Loss)             \
  TORCH_ARG(double, lambda_base) = Loss::lambda_base;   \
  TORCH_ARG(double, lambda_gamma) = Loss::lambda_gamma; \
  TORCH_ARG(double, lambda_min) = Loss::lambda_min

/// One against all: see functional::linear_margin_binary_cross_entropy.
struct TORCHMARGIN_API OneAgainstAll {
  std::string kind = "c";
  double margin = 0.0;
  double power = 1.0;
  double positive_weight = 1.0;
  double negative_weight = 1.0;
  double first_bias = 0.0; ///< what the one bias starts at
};

/// What all losses come down to, and what one of your own starts from.
struct TORCHMARGIN_API MarginLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(MarginLossOptions);
  TORCH_ARG(LossForm, form);
  TORCH_ARG(bool, bias) = false;
  /// The so many hardest other classes of each row have scale cos(max(theta_j - hardest_margin, 0)).
  TORCH_ARG(int64_t, hardest) = 0;
  TORCH_ARG(double, hardest_margin) = 0.0;
  /// Instead of a softmax; of the form its scale counts, and the bias is 0-dim.
  TORCH_ARG(std::optional<OneAgainstAll>, one_against_all) = std::nullopt;
};

struct TORCHMARGIN_API SoftmaxLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(SoftmaxLossOptions);
  TORCH_ARG(double, scale) = published::Softmax::scale;
  TORCH_ARG(bool, bias) = published::Softmax::bias;
};

struct TORCHMARGIN_API ModifiedSoftmaxLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(ModifiedSoftmaxLossOptions);
  TORCH_ARG(double, scale) = published::ModifiedSoftmax::scale;
};

struct TORCHMARGIN_API NormalizedSoftmaxLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(NormalizedSoftmaxLossOptions);
  TORCH_ARG(double, scale) = published::NormalizedSoftmax::scale;
};

struct TORCHMARGIN_API SphereFaceLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(SphereFaceLossOptions);
  TORCH_ARG(double, scale) = published::SphereFace::scale;
  TORCH_ARG(double, margin) = published::SphereFace::margin; ///< multiplies the angle
  TORCH_ARG(bool, normalize_input) = published::SphereFace::normalize_input;
  TORCHMARGIN_MARGIN_OPTIONS(published::SphereFace);
  TORCHMARGIN_ANNEALING_OPTIONS(published::SphereFace);

 public:
  /// SphereFace-R: Liu et al., "SphereFace Revived", TPAMI 2022 (arXiv:2109.05565).
  static SphereFaceLossOptions normalized(int64_t in_features, int64_t num_classes) {
    using Loss = published::NormalizedSphereFace;
    SphereFaceLossOptions options(in_features, num_classes);
    options.scale(Loss::scale).margin(Loss::margin).normalize_input(Loss::normalize_input);
    options.extension(Loss::extension).margin_gradient(Loss::margin_gradient);
    return options.lambda_base(Loss::lambda_base).lambda_gamma(Loss::lambda_gamma).lambda_min(Loss::lambda_min);
  }
};

struct TORCHMARGIN_API LargeMarginSoftmaxLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(LargeMarginSoftmaxLossOptions);
  TORCH_ARG(double, scale) = published::LargeMarginSoftmax::scale;
  TORCH_ARG(double, margin) = published::LargeMarginSoftmax::margin; ///< multiplies the angle
  TORCHMARGIN_MARGIN_OPTIONS(published::LargeMarginSoftmax);
  TORCHMARGIN_ANNEALING_OPTIONS(published::LargeMarginSoftmax);
};

struct TORCHMARGIN_API CosFaceLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(CosFaceLossOptions);
  TORCH_ARG(double, scale) = published::CosFace::scale;
  TORCH_ARG(double, margin) = published::CosFace::margin; ///< a difference of cosines
  TORCHMARGIN_MARGIN_OPTIONS(published::CosFace);
  /// Instead of margin: one of each class, [C] float without a gradient.
  TORCH_ARG(at::Tensor, class_margins);
};

struct TORCHMARGIN_API ArcFaceLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(ArcFaceLossOptions);
  TORCH_ARG(double, scale) = published::ArcFace::scale;
  TORCH_ARG(double, margin) = published::ArcFace::margin; ///< radians
  TORCHMARGIN_MARGIN_OPTIONS(published::ArcFace);
  /// Instead of margin: one of each class, [C] float without a gradient.
  TORCH_ARG(at::Tensor, class_margins);
};

struct TORCHMARGIN_API CombinedMarginLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(CombinedMarginLossOptions);
  TORCH_ARG(double, scale) = published::CombinedMargin::scale;
  TORCH_ARG(double, m1) = published::CombinedMargin::m1;
  TORCH_ARG(double, m2) = published::CombinedMargin::m2; ///< radians
  TORCH_ARG(double, m3) = published::CombinedMargin::m3;
  TORCHMARGIN_MARGIN_OPTIONS(published::CombinedMargin);
};

struct TORCHMARGIN_API AdaFaceLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(AdaFaceLossOptions);
  TORCH_ARG(double, scale) = published::AdaFace::scale;
  TORCH_ARG(double, margin) = published::AdaFace::margin;
  TORCH_ARG(double, h) = published::AdaFace::h;
  TORCH_ARG(double, momentum) = published::AdaFace::momentum; ///< of the newest batch in the running statistics
};

struct TORCHMARGIN_API MagFaceLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(MagFaceLossOptions);
  TORCH_ARG(double, scale) = published::MagFace::scale;
  TORCH_ARG(double, a_min) = published::MagFace::a_min; ///< lengths
  TORCH_ARG(double, a_max) = published::MagFace::a_max;
  TORCH_ARG(double, m_min) = published::MagFace::m_min; ///< radians, the margins at these lengths
  TORCH_ARG(double, m_max) = published::MagFace::m_max;
  TORCH_ARG(double, regularizer) = published::MagFace::regularizer;
};

struct TORCHMARGIN_API ElasticFaceLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(ElasticFaceLossOptions);
  TORCH_ARG(double, scale) = published::ElasticFace::scale;
  /// "arc": the margin is added to the angle; "cos": taken from the cosine.
  TORCH_ARG(std::string, kind) = published::ElasticFace::kind;
  TORCH_ARG(double, margin) = published::ElasticFace::margin;
  TORCH_ARG(double, deviation) = published::ElasticFace::deviation;
};

struct TORCHMARGIN_API SubCenterArcFaceLossOptions {
  TORCHMARGIN_LOSS_OPTIONS_OF(SubCenterArcFaceLossOptions, published::SubCenterArcFace::sub_centers);
  TORCH_ARG(double, scale) = published::SubCenterArcFace::scale;
  TORCH_ARG(double, margin) = published::SubCenterArcFace::margin; ///< radians
  TORCHMARGIN_MARGIN_OPTIONS(published::SubCenterArcFace);
  /// Instead of margin: one of each class, [C] float without a gradient.
  TORCH_ARG(at::Tensor, class_margins);
};

struct TORCHMARGIN_API CurricularFaceLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(CurricularFaceLossOptions);
  TORCH_ARG(double, scale) = published::CurricularFace::scale;
  TORCH_ARG(double, margin) = published::CurricularFace::margin; ///< radians
  TORCH_ARG(double, momentum) = published::CurricularFace::momentum; ///< of the newest batch in the running mean
};

struct TORCHMARGIN_API MVSoftmaxLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(MVSoftmaxLossOptions);
  TORCH_ARG(double, scale) = published::MVSoftmax::scale;
  /// "am": the margin is taken from the cosine; "arc": added to the angle.
  TORCH_ARG(std::string, kind) = published::MVSoftmax::kind;
  TORCH_ARG(double, margin) = published::MVSoftmax::margin;
  TORCH_ARG(double, t) = published::MVSoftmax::t;
};

struct TORCHMARGIN_API InterTopKArcFaceLossOptions {
  TORCHMARGIN_LOSS_OPTIONS_OF(InterTopKArcFaceLossOptions, published::InterTopKArcFace::sub_centers);
  TORCH_ARG(double, scale) = published::InterTopKArcFace::scale;
  TORCH_ARG(double, margin) = published::InterTopKArcFace::margin; ///< radians
  TORCH_ARG(int64_t, hardest) = published::InterTopKArcFace::hardest;
  TORCH_ARG(double, hardest_margin) = published::InterTopKArcFace::hardest_margin; ///< radians
};

struct TORCHMARGIN_API SphereFace2LossOptions {
  TORCHMARGIN_LOSS_OPTIONS(SphereFace2LossOptions);
  TORCH_ARG(double, scale) = published::SphereFace2::scale;
  /// "c", "a" (radians) or "m": see functional::linear_margin_binary_cross_entropy.
  TORCH_ARG(std::string, kind) = published::SphereFace2::kind;
  TORCH_ARG(double, margin) = published::SphereFace2::margin;
  TORCH_ARG(double, t) = published::SphereFace2::t;
  TORCH_ARG(double, positive_weight) = published::SphereFace2::positive_weight;
};

struct TORCHMARGIN_API UniFaceLossOptions {
  TORCHMARGIN_LOSS_OPTIONS(UniFaceLossOptions);
  TORCH_ARG(double, scale) = published::UniFace::scale;
  TORCH_ARG(double, margin) = published::UniFace::margin; ///< a difference of cosines
};

#undef TORCHMARGIN_LOSS_OPTIONS
#undef TORCHMARGIN_LOSS_OPTIONS_OF
#undef TORCHMARGIN_MARGIN_OPTIONS
#undef TORCHMARGIN_ANNEALING_OPTIONS

} // namespace torchmargin::nn
