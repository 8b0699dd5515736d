// One against all: every class has a logistic loss of its own, of a curve through its cosine (SphereFace2: Wen et al.,
// ICLR 2022, arXiv:2108.01513; UniFace's UCE: Zhou et al., ICCV 2023). The own class's is here, in float64; that of the
// others is in the hot loops (cpu/row_kernels.cpp, cuda/kernels/head.cuh). Read by host and device compilers.
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

} // namespace torchmargin
