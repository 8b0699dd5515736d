// One against all: every class has a logistic loss of its own, of a curve through its cosine (SphereFace2: Wen et al.,
// ICLR 2022, arXiv:2108.01513; UniFace's UCE: Zhou et al., ICCV 2023). Plain numbers, float64; the vectors of the CPU's
// hot loops have their own form of it (cpu/row_kernels.cpp). Read by host and device compilers.
#pragma once

#include <cmath>

#include "math/host_device.h"

namespace torchmargin {

// Where the margin m stands, and g(c) = 2 ((c + 1) / 2)^power - 1.
enum class BinaryKind {
  none, // not one against all
  cosine, // "c": the own class has g(c) - m, another g(c) + m
  angle, // "a": g(cos(theta + m)), continued past pi, and g(cos(theta - m))
  before // "m": g(c - m) and g(c)
};

struct BinaryForm {
  BinaryKind kind = BinaryKind::none;
  double margin = 0.0;
  double power = 1.0;
};

// x^power; x < 0 has one only for a whole power, and counts as 0 otherwise, for it is a cosine of -1 that was rounded.
TORCHMARGIN_HOST_DEVICE inline double power_of(double x, double power) {
  return x < 0.0 && power != std::floor(power) ? 0.0 : std::pow(x, power);
}

struct Curve {
  double value;
  double slope;
};

// g(c). NB: with power 1 it is c itself.
TORCHMARGIN_HOST_DEVICE inline Curve curve_of(double power, double c) {
  if (power == 1.0) {
    return {c, 1.0};
  }
  const double half = 0.5 * (c + 1.0);
  return {2.0 * power_of(half, power) - 1.0, power * power_of(half, power - 1.0)};
}

// N(c) of another class. At c = +-1 the angle's slope is infinite, and its direction nothing: there it is left out.
TORCHMARGIN_HOST_DEVICE inline Curve negative_curve(const BinaryForm& form, double c) {
  if (form.kind != BinaryKind::angle) {
    const Curve curve = curve_of(form.power, c);
    return {form.kind == BinaryKind::cosine ? curve.value + form.margin : curve.value, curve.slope};
  }
  const double square = (1.0 - c) * (1.0 + c);
  const double sine = square > 0.0 ? std::sqrt(square) : 0.0 * square; // NaN stays
  const double cosine_of_margin = std::cos(form.margin);
  const double sine_of_margin = std::sin(form.margin);
  const Curve curve = curve_of(form.power, c * cosine_of_margin + sine * sine_of_margin);
  const double inner = square > 0.0 ? cosine_of_margin - c / sine * sine_of_margin : cosine_of_margin;
  return {curve.value, curve.slope * inner};
}

// log(1 + e^z) and its slope 1 / (1 + e^-z), exact to the last digits for any z.
TORCHMARGIN_HOST_DEVICE inline Curve softplus(double z) {
  const double small = std::exp(-std::fabs(z));
  const double part = 1.0 / (1.0 + small);
  const double value = z > 0.0 ? z + std::log1p(small) : std::log1p(small);
  return {value, z >= 0.0 ? part : small * part};
}

} // namespace torchmargin
