/// @file
/// The parameters of a margin-softmax loss and the published losses as presets.
/// Plain C++ (no ATen): LibTorch programs, the library and nvcc read this file.
/// Angles and m2 are in radians, never degrees.
#pragma once

namespace torchmargin {

/// What E(phi) does where cos(phi) would rise again, past phi = pi.
enum class Extension : int {
  none, ///< cos(phi): InsightFace since 2022-12, Paddle, OneFlow
  linear, ///< cos(theta) - m2 sin(m2) past pi, m1 = 1 only: the ArcFace paper's code
  easy, ///< cos(phi) only where cos(theta) > 0, m1 = 1 only: "easy_margin"
  clip, ///< cos(min(max(phi, 0), pi)): AdaFace
  monotonic, ///< (-1)^k cos(phi) - 2k, k = floor(phi / pi): SphereFace, L-Softmax
  continuous, ///< cos(theta) - (1 - cos(m2)) past pi, m1 = 1 only: wespeaker, 3D-Speaker
};

enum class MarginGradient : int {
  exact, ///< d(psi)/d(theta)
  straight_through, ///< psi = cos(theta) + stop_gradient(psi - cos(theta))
};

/// psi = cos(theta) + margin_weight (E(m1 theta + m2) - m3 - cos(theta));
/// the target's logit is scale * length * psi (+ bias).
struct MarginParameters {
  double scale = 1.0; ///< > 0
  double m1 = 1.0; ///< multiplies the angle, > 0 (SphereFace, L-Softmax)
  double m2 = 0.0; ///< is added to the angle, in radians (ArcFace)
  double m3 = 0.0; ///< is taken from the cosine (CosFace)
  Extension extension = Extension::none;
  double margin_weight = 1.0; ///< in [0, 1]; 1 / (1 + lambda) of A-Softmax's annealing
  MarginGradient margin_gradient = MarginGradient::exact;
};

/// A loss of the field: its margin, and whether embeddings and class weights are
/// brought to unit length first.
struct LossForm {
  MarginParameters margin;
  bool normalize_input = true;
  bool normalize_weight = true;
};

namespace presets {

/// Softmax cross-entropy of x W^T + b.
constexpr LossForm softmax() {
  return {MarginParameters{}, /*normalize_input=*/false, /*normalize_weight=*/false};
}

/// A-Softmax, Liu et al., "SphereFace", CVPR 2017 (arXiv:1704.08063). m1 = 1 is the
/// modified softmax of the same paper.
constexpr LossForm sphereface(double m1 = 4.0) {
  MarginParameters margin;
  margin.m1 = m1;
  margin.extension = Extension::monotonic;
  return {margin, /*normalize_input=*/false, /*normalize_weight=*/true};
}

constexpr LossForm modified_softmax() {
  return {MarginParameters{}, /*normalize_input=*/false, /*normalize_weight=*/true};
}

/// L-Softmax, Liu et al., ICML 2016 (arXiv:1612.02295).
constexpr LossForm large_margin_softmax(double m1 = 4.0) {
  MarginParameters margin;
  margin.m1 = m1;
  margin.extension = Extension::monotonic;
  return {margin, /*normalize_input=*/false, /*normalize_weight=*/false};
}

/// NormFace, Wang et al., ACM MM 2017 (arXiv:1704.06369).
constexpr LossForm normalized_softmax(double scale = 64.0) {
  MarginParameters margin;
  margin.scale = scale;
  return {margin};
}

/// Wang et al., "CosFace", CVPR 2018 (arXiv:1801.09414).
constexpr LossForm cosface(double scale = 64.0, double m3 = 0.35) {
  MarginParameters margin;
  margin.scale = scale;
  margin.m3 = m3;
  return {margin};
}

/// Deng et al., "ArcFace", CVPR 2019 (arXiv:1801.07698).
constexpr LossForm arcface(double scale = 64.0, double m2 = 0.5) {
  MarginParameters margin;
  margin.scale = scale;
  margin.m2 = m2;
  margin.extension = Extension::linear;
  return {margin};
}

/// The combined margin cos(m1 theta + m2) - m3 of the ArcFace paper.
constexpr LossForm combined(double scale = 64.0, double m1 = 1.0, double m2 = 0.3, double m3 = 0.2) {
  MarginParameters margin;
  margin.scale = scale;
  margin.m1 = m1;
  margin.m2 = m2;
  margin.m3 = m3;
  return {margin};
}

} // namespace presets
} // namespace torchmargin
