// The margin as a function of the target's cosine, for callers who hold cosines already:
//   theta = 2 atan2(sqrt(1 - c), sqrt(1 + c)),   psi and its derivatives to c and to m2.
// A cosine past +-1 (products of unit vectors overshoot) counts as +-1; NaN stays. There the
// derivative to c is the true limit wherever that is finite.
#pragma once

#include <cmath>

#include "math/angle.h"
#include "math/host_device.h"
#include "math/margin.h"

namespace torchmargin {

TORCHMARGIN_HOST_DEVICE inline Angle angle_of_cosine(double cosine) {
  Angle angle{};
  angle.cosine = cosine > 1.0 ? 1.0 : (cosine < -1.0 ? -1.0 : cosine); // NaN passes
  const double below = 1.0 - angle.cosine;
  const double above = 1.0 + angle.cosine;
  angle.theta = 2.0 * std::atan2(std::sqrt(below), std::sqrt(above));
  angle.sine = std::sqrt(below * above);
  return angle;
}

struct CosineMarginValue {
  double psi;
  double dcosine; // d(psi)/dc
  double dm2; // d(psi)/d(m2); d(psi)/d(m3) is -mu
};

// mu = margin_weight * sample_margin_weight of the row; m2 and m3 are the row's own.
TORCHMARGIN_HOST_DEVICE inline CosineMarginValue
apply_margin_to_cosine(const MarginParameters& parameters, double cosine, double m2, double m3, double mu) {
  const Angle angle = angle_of_cosine(cosine);
  const MarginValue value = apply_margin(parameters, angle, m2, m3, mu);
  if (parameters.margin_gradient == MarginGradient::straight_through) {
    return {value.psi, 1.0, value.dm2};
  }
  if (parameters.m1 == 1.0 && m2 == 0.0) { // E is c itself
    return {value.psi, 1.0, value.dm2};
  }
  if (angle.sine == 0.0) {
    return {value.psi, value.end_slope, value.dm2};
  }
  return {value.psi, -value.dtheta / angle.sine, value.dm2};
}

} // namespace torchmargin
