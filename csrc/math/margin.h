// psi(theta), the target's cosine with its margin, and its derivatives: the one
// place in the library where the margins of all losses are written down.
//   phi = m1 theta + m2,   psi = cos(theta) + mu (E(phi) - m3 - cos(theta))
// Everything is float64; angles are in radians. The same formula, readable and in
// Python, is torchmargin.reference.
#pragma once

#include <cmath>

#include "math/angle.h"
#include "math/host_device.h"
#include "torchmargin/margin.h"

namespace torchmargin {

struct MarginValue {
  double psi;
  double dtheta; // d(psi)/d(theta)
  double dm2; // d(psi)/d(m2); d(psi)/d(m3) is -mu
  double end_slope; // d(psi)/d(cos(theta)) where sin(theta) = 0 and -dtheta / sin(theta) says nothing
};

// E(phi) with its derivatives.
TORCHMARGIN_HOST_DEVICE inline MarginValue
extended_cosine(const MarginParameters& parameters, const Angle& angle, double m2) {
  constexpr double kPi = 3.14159265358979323846;
  const double m1 = parameters.m1;
  const double phi = m1 * angle.theta + m2;
  // Without an angular margin E is cos(theta) itself, not the cosine of a rounded angle.
  const bool plain = m1 == 1.0 && m2 == 0.0;
  const double cosine = plain ? angle.cosine : std::cos(phi);
  const double sine = plain ? angle.sine : std::sin(phi);
  switch (parameters.extension) {
    case Extension::linear:
      if (phi > kPi) {
        return {angle.cosine - m2 * std::sin(m2), -angle.sine, -(std::sin(m2) + m2 * std::cos(m2)), 1.0};
      }
      break;
    case Extension::continuous:
      if (phi > kPi) {
        return {angle.cosine - (1.0 - std::cos(m2)), -angle.sine, -std::sin(m2), 1.0};
      }
      break;
    case Extension::easy:
      if (!(angle.cosine > 0.0)) {
        return {angle.cosine, -angle.sine, 0.0, 1.0};
      }
      break;
    case Extension::clip:
      if (phi < 0.0) {
        return {1.0, 0.0, 0.0, 0.0};
      }
      if (phi > kPi) {
        return {-1.0, 0.0, 0.0, 0.0};
      }
      break;
    case Extension::monotonic: {
      const double k = plain ? 0.0 : std::floor(phi / kPi);
      const double parity = std::fmod(k, 2.0) == 0.0 ? 1.0 : -1.0;
      const double fall = std::fabs(sine);
      return {parity * cosine - 2.0 * k, -m1 * fall, -fall, m1 * m1 * std::fabs(cosine)};
    }
    case Extension::none:
      break;
  }
  return {cosine, -m1 * sine, -sine, m1 * m1 * cosine * angle.cosine};
}

// mu = margin_weight * sample_margin_weight of the row; m2 and m3 are the row's own.
TORCHMARGIN_HOST_DEVICE inline MarginValue
apply_margin(const MarginParameters& parameters, const Angle& angle, double m2, double m3, double mu) {
  const MarginValue extended = extended_cosine(parameters, angle, m2);
  MarginValue value;
  value.psi = angle.cosine + mu * (extended.psi - m3 - angle.cosine);
  value.dtheta = parameters.margin_gradient == MarginGradient::straight_through
      ? -angle.sine
      : -(1.0 - mu) * angle.sine + mu * extended.dtheta;
  value.dm2 = mu * extended.dm2;
  value.end_slope = 1.0 - mu + mu * extended.end_slope;
  return value;
}

} // namespace torchmargin
