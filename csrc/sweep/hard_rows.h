// How a row's hard negatives change, in float64 before the sweep: from the row's angle to its class, or from what the
// caller gave. Host and device compilers read it.
#pragma once

#include <cmath>
#include <limits>

#include "math/host_device.h"
#include "sweep/kernels.h"
#include "sweep/target_rows.h"

namespace torchmargin {

// A sum of exp(z - shift) holds C logits of up to 88 above the shift, and exp(-87) is a normal number: of float32, and
// so of float64.
constexpr double kHighestExponent = 88.0;
constexpr double kExponentRange = 175.0;

// The smallest power of two that is not below `size`; 1 where there is none.
TORCHMARGIN_HOST_DEVICE inline double power_of_two_above(double size) {
  if (!std::isfinite(size) || size <= 0.0) {
    return 1.0;
  }
  int exponent = 0;
  const double mantissa = std::frexp(size, &exponent);
  return std::ldexp(1.0, mantissa == 0.5 ? exponent - 1 : exponent);
}

TORCHMARGIN_HOST_DEVICE inline double larger(double a, double b) {
  return b > a ? b : a;
}
TORCHMARGIN_HOST_DEVICE inline double smaller_if_finite(double a, double b) {
  return b < a && std::isfinite(b) ? b : a;
}

// The plain margin of a row, which has no extension and no weight: cos(m1 theta + m2) - m3.
TORCHMARGIN_HOST_DEVICE inline double plain_margin(const TargetContext& context, int64_t row, const Angle& angle) {
  const MarginParameters& margin = context.margin;
  const double m2 = margin.m2 + vector_element(context.sample_m2, row, 0.0);
  const double m3 = margin.m3 + vector_element(context.sample_m3, row, 0.0);
  const double cosine = margin.m1 == 1.0 && m2 == 0.0 ? angle.cosine : std::cos(margin.m1 * angle.theta + m2);
  return cosine - m3;
}

TORCHMARGIN_HOST_DEVICE inline HardRow hard_row(const HardRowsArgs& args, int64_t i) {
  constexpr double kNowhere = std::numeric_limits<double>::infinity();
  const TargetContext& context = args.context;
  HardRow row{
      kNowhere,
      matrix_element(args.coefficients, i, 0),
      matrix_element(args.coefficients, i, 1),
      matrix_element(args.coefficients, i, 2),
      std::nan(""),
      1.0};
  const int64_t target = context.target[i];
  if (args.threshold.data != nullptr) {
    row.threshold = vector_element(args.threshold, i, 0.0);
  } else if (target >= 0 && target < context.classes) {
    row.threshold = plain_margin(context, i, angle_of(args.state[i]));
  }
  double highest = 1.0; // of all cosines and n(c)
  double lowest = -1.0;
  if (row.threshold < 1.0) {
    const auto changed = [&](double c) { return (row.a * c + row.b) * c + row.d; };
    const double from = larger(row.threshold, -1.0);
    highest = larger(larger(row.threshold, changed(from)), changed(1.0));
    lowest = smaller_if_finite(smaller_if_finite(lowest, changed(from)), changed(1.0));
    const double vertex = row.a != 0.0 ? -row.b / (2.0 * row.a) : from;
    if (vertex > from && vertex < 1.0) {
      highest = larger(highest, changed(vertex));
      lowest = smaller_if_finite(lowest, changed(vertex));
    }
    const double first = 2.0 * row.a * from + row.b;
    const double last = 2.0 * row.a + row.b;
    const double steepest = larger(std::fabs(first), std::fabs(last));
    const double farthest = larger(std::fabs(first - 1.0), std::fabs(last - 1.0));
    row.growth = power_of_two_above(larger(1.0, larger(steepest, farthest)));
  } else { // nothing is hard, and no rounded cosine is above it. NaN as well.
    row.threshold = kNowhere;
  }
  const double scale = context.margin.scale;
  const double classes = std::log(static_cast<double>(context.classes));
  if (!args.with_bias && scale * (highest - lowest) + classes <= kExponentRange) {
    row.shift = larger(0.0, scale * highest - kHighestExponent + classes);
  }
  return row;
}

} // namespace torchmargin
