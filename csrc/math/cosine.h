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

// dE/dc at c = +-1, where the sine of theta is 0.
TORCHMARGIN_HOST_DEVICE inline double
extended_cosine_slope_at_the_end(const MarginParameters& parameters, const Angle& angle, double m2) {
  constexpr double kPi = 3.14159265358979323846;
  const double m1 = parameters.m1;
  const double phi = m1 * angle.theta + m2;
  switch (parameters.extension) {
    case Extension::linear:
    case Extension::continuous:
      if (phi > kPi && m2 != 0.0) {
        return 1.0;
      }
      break;
    case Extension::easy:
      if (!(angle.cosine > 0.0)) {
        return 1.0;
      }
      break;
    case Extension::clip:
      if (phi < 0.0 || phi > kPi) {
        return 0.0;
      }
      break;
    case Extension::monotonic:
      return m1 * m1 * std::fabs(std::cos(phi));
    case Extension::none:
      break;
  }
  return m1 * m1 * std::cos(phi) * angle.cosine;
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
    const double slope = extended_cosine_slope_at_the_end(parameters, angle, m2);
    return {value.psi, 1.0 - mu + mu * slope, value.dm2};
  }
  return {value.psi, -value.dtheta / angle.sine, value.dm2};
}

} // namespace torchmargin
