/// @file
/// The parameters of a margin-softmax loss; the published losses are in presets.h.
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

} // namespace torchmargin
