/// @file
/// The published losses: the numbers that each comes with, in one table, and their margins as presets. Plain C++ (no
/// ATen), angles in radians. The modules' options take their defaults from the table; Python's constructors repeat them
/// where people read them, and a test compares.
#pragma once

#include <cstdint>

#include "torchmargin/margin.h"

namespace torchmargin {

/// A loss of the field: its margin, and whether embeddings and class weights are
/// brought to unit length first.
struct LossForm {
  MarginParameters margin;
  bool normalize_input = true;
  bool normalize_weight = true;
};

/// The table. Papers stand beside the presets below and the modules (modules.h).
namespace published {

/// What most of them have in common.
struct Common {
  static constexpr double scale = 64.0;
  static constexpr Extension extension = Extension::none;
  static constexpr MarginGradient margin_gradient = MarginGradient::exact;
  static constexpr bool normalize_input = true;
  static constexpr bool normalize_weight = true;
};

struct Softmax : Common {
  static constexpr double scale = 1.0;
  static constexpr bool bias = true;
  static constexpr bool normalize_input = false;
  static constexpr bool normalize_weight = false;
};

struct ModifiedSoftmax : Common {
  static constexpr double scale = 1.0;
  static constexpr bool normalize_input = false;
};

struct NormalizedSoftmax : Common {};

/// The annealing of the paper's code: lambda = max(lambda_min, lambda_base / (1 + lambda_gamma step)).
struct SphereFace : Common {
  static constexpr double scale = 1.0;
  static constexpr double margin = 4.0; ///< multiplies the angle
  static constexpr double lambda_base = 1000.0;
  static constexpr double lambda_gamma = 0.12;
  static constexpr double lambda_min = 5.0;
  static constexpr Extension extension = Extension::monotonic;
  static constexpr bool normalize_input = false;
};

/// SphereFace-R: Liu et al., "SphereFace Revived", TPAMI 2022 (arXiv:2109.05565).
struct NormalizedSphereFace : SphereFace {
  static constexpr double scale = 30.0;
  static constexpr double margin = 1.5;
  static constexpr double lambda_base = 0.0;
  static constexpr double lambda_gamma = 0.0;
  static constexpr double lambda_min = 0.0;
  static constexpr MarginGradient margin_gradient = MarginGradient::straight_through;
  static constexpr bool normalize_input = true;
};

/// Not annealed.
struct LargeMarginSoftmax : SphereFace {
  static constexpr double lambda_base = 0.0;
  static constexpr double lambda_min = 0.0;
  static constexpr bool normalize_weight = false;
};

struct CosFace : Common {
  static constexpr double margin = 0.35; ///< a difference of cosines
};

struct ArcFace : Common {
  static constexpr double margin = 0.5;
  static constexpr Extension extension = Extension::linear;
};

struct CombinedMargin : Common {
  static constexpr double m1 = 1.0;
  static constexpr double m2 = 0.3;
  static constexpr double m3 = 0.2;
};

struct AdaFace : Common {
  static constexpr double margin = 0.4;
  static constexpr double h = 0.333;
  static constexpr double momentum = 0.01; ///< of the newest batch in the running statistics
  static constexpr double length_mean = 20.0; ///< the statistics before the first batch
  static constexpr double length_std = 100.0;
  static constexpr Extension extension = Extension::clip;
};

struct MagFace : Common {
  static constexpr double a_min = 10.0; ///< lengths
  static constexpr double a_max = 110.0;
  static constexpr double m_min = 0.45; ///< the margins at these lengths
  static constexpr double m_max = 0.8;
  static constexpr double regularizer = 35.0;
  static constexpr Extension extension = Extension::linear;
};

/// K centers for each class.
struct SubCenterArcFace : ArcFace {
  static constexpr int64_t sub_centers = 3;
};

struct CurricularFace : Common {
  static constexpr double margin = 0.5;
  static constexpr double momentum = 0.01; ///< of the newest batch in the running mean of cosines
  static constexpr Extension extension = Extension::linear;
};

struct MVSoftmax : Common {
  static constexpr double scale = 32.0;
  static constexpr const char* kind = "am"; ///< the margin is taken from the cosine; "arc": added to the angle
  static constexpr double margin = 0.35;
  static constexpr double t = 0.2;
  static constexpr Extension extension = Extension::easy;
};

struct InterTopKArcFace : Common {
  static constexpr double scale = 32.0;
  static constexpr double margin = 0.2;
  static constexpr int64_t sub_centers = 3;
  static constexpr int64_t hardest = 5; ///< classes
  static constexpr double hardest_margin = 0.06;
  static constexpr Extension extension = Extension::continuous;
};

struct SphereFace2 : Common {
  static constexpr double scale = 32.0;
  static constexpr const char* kind = "c"; ///< where the margin stands: see linear_margin_binary_cross_entropy
  static constexpr double margin = 0.2;
  static constexpr double t = 3.0; ///< the power of the curve
  static constexpr double positive_weight = 0.7; ///< lambda; the other classes have 1 - lambda
  static constexpr bool bias = true;
};

struct UniFace : Common {
  static constexpr double margin = 0.4;
  static constexpr bool bias = true;
};

struct ElasticFace : Common {
  static constexpr const char* kind = "arc"; ///< the margin is added to the angle; "cos": taken from the cosine
  static constexpr double margin = 0.5;
  static constexpr double deviation = 0.0125;
};

/// A loss of the table without its margin.
template <typename Loss>
constexpr LossForm form(double scale = Loss::scale) {
  LossForm form;
  form.margin.scale = scale;
  form.margin.extension = Loss::extension;
  form.margin.margin_gradient = Loss::margin_gradient;
  form.normalize_input = Loss::normalize_input;
  form.normalize_weight = Loss::normalize_weight;
  return form;
}

} // namespace published

namespace presets {

/// Softmax cross-entropy of x W^T + b.
constexpr LossForm softmax() {
  return published::form<published::Softmax>();
}

/// A-Softmax, Liu et al., "SphereFace", CVPR 2017 (arXiv:1704.08063). m1 = 1 is the
/// modified softmax of the same paper.
constexpr LossForm sphereface(double m1 = published::SphereFace::margin) {
  LossForm form = published::form<published::SphereFace>();
  form.margin.m1 = m1;
  return form;
}

constexpr LossForm modified_softmax() {
  return published::form<published::ModifiedSoftmax>();
}

/// L-Softmax, Liu et al., ICML 2016 (arXiv:1612.02295).
constexpr LossForm large_margin_softmax(double m1 = published::LargeMarginSoftmax::margin) {
  LossForm form = published::form<published::LargeMarginSoftmax>();
  form.margin.m1 = m1;
  return form;
}

/// NormFace, Wang et al., ACM MM 2017 (arXiv:1704.06369).
constexpr LossForm normalized_softmax(double scale = published::NormalizedSoftmax::scale) {
  return published::form<published::NormalizedSoftmax>(scale);
}

/// Wang et al., "CosFace", CVPR 2018 (arXiv:1801.09414).
constexpr LossForm cosface(double scale = published::CosFace::scale, double m3 = published::CosFace::margin) {
  LossForm form = published::form<published::CosFace>(scale);
  form.margin.m3 = m3;
  return form;
}

/// Deng et al., "ArcFace", CVPR 2019 (arXiv:1801.07698).
constexpr LossForm arcface(double scale = published::ArcFace::scale, double m2 = published::ArcFace::margin) {
  LossForm form = published::form<published::ArcFace>(scale);
  form.margin.m2 = m2;
  return form;
}

/// The combined margin cos(m1 theta + m2) - m3 of the ArcFace paper.
constexpr LossForm combined(
    double scale = published::CombinedMargin::scale,
    double m1 = published::CombinedMargin::m1,
    double m2 = published::CombinedMargin::m2,
    double m3 = published::CombinedMargin::m3) {
  LossForm form = published::form<published::CombinedMargin>(scale);
  form.margin.m1 = m1;
  form.margin.m2 = m2;
  form.margin.m3 = m3;
  return form;
}

} // namespace presets
} // namespace torchmargin
