// The angle between two vectors, from the lengths of the difference and the sum
// of their unit vectors: theta = 2 atan2(|x-w|, |x+w|) is exact to the last digits
// at 0 and pi, where the arccos of a rounded dot product has lost half of them.
// Its gradient is the unit tangent, which stays finite there.
#pragma once

#include <cmath>

#include "math/host_device.h"

namespace torchmargin {

// A norm below this is a zero vector: it has no direction and gets inverse norm 0.
constexpr double kZeroNorm = 1e-12;
// Closer than this to parallel or antiparallel counts as exactly that.
constexpr double kParallel = 8.8817841970012523e-16; // 2^-50

// 1 / norm; 0 for a zero vector; NaN where the norm is not finite.
TORCHMARGIN_HOST_DEVICE inline double inverse_norm(double squared_norm) {
  const double norm = std::sqrt(squared_norm);
  if (norm < kZeroNorm) {
    return 0.0;
  }
  return std::isfinite(norm) ? 1.0 / norm : std::nan("");
}

struct Angle {
  double theta; // in [0, pi]
  double cosine;
  double sine;
  // The unit tangent at one of the two unit vectors, component by component, is
  // ((other + sign * self) - sign * half * self) * inverse_sine:
  // the direction in which moving `self` closes the angle.
  double sign;
  double half;
  double inverse_sine;

  TORCHMARGIN_HOST_DEVICE double tangent(double self, double other) const {
    return ((other + sign * self) - sign * half * self) * inverse_sine;
  }
};

// delta_squared = |x-w|^2 and sigma_squared = |x+w|^2 of unit vectors x and w.
TORCHMARGIN_HOST_DEVICE inline Angle angle_between(double delta_squared, double sigma_squared) {
  const double delta = std::sqrt(delta_squared);
  const double sigma = std::sqrt(sigma_squared);
  constexpr double kPi = 3.14159265358979323846;
  if (delta <= kParallel) {
    return {0.0, 1.0, 0.0, -1.0, 0.0, 0.0};
  }
  if (sigma <= kParallel) {
    return {kPi, -1.0, 0.0, 1.0, 0.0, 0.0};
  }
  Angle angle;
  angle.theta = 2.0 * std::atan2(delta, sigma);
  angle.sine = 0.5 * delta * sigma;
  angle.inverse_sine = 1.0 / angle.sine;
  if (delta <= sigma) {
    angle.half = 0.5 * delta_squared;
    angle.sign = -1.0;
    angle.cosine = 1.0 - angle.half;
  } else {
    angle.half = 0.5 * sigma_squared;
    angle.sign = 1.0;
    angle.cosine = angle.half - 1.0;
  }
  return angle;
}

// A zero vector is at a right angle to everything; its tangent is the other vector.
TORCHMARGIN_HOST_DEVICE inline Angle right_angle() {
  constexpr double kHalfPi = 1.57079632679489661923;
  return {kHalfPi, 0.0, 1.0, 0.0, 0.0, 1.0};
}

} // namespace torchmargin
