// psi and its derivatives against the published formulas in long double, and the seams.
#include <gtest/gtest.h>

#include <cmath>

#include "math/margin.h"
#include "torchmargin/presets.h"

namespace {

using namespace torchmargin;

constexpr long double kPi = 3.14159265358979323846264338327950288L;
constexpr double kU = 0x1p-53; // the unit roundoff

Angle at(double theta) {
  Angle angle{};
  angle.theta = theta;
  angle.cosine = std::cos(theta);
  angle.sine = std::sin(theta);
  return angle;
}

long double extended(const MarginParameters& p, long double theta, long double m2) {
  const long double phi = p.m1 * theta + m2;
  switch (p.extension) {
    case Extension::linear:
      return phi <= kPi ? std::cos(phi) : std::cos(theta) - m2 * std::sin(m2);
    case Extension::continuous:
      return phi <= kPi ? std::cos(phi) : std::cos(theta) - (1 - std::cos(m2));
    case Extension::easy:
      return std::cos(theta) > 0 ? std::cos(phi) : std::cos(theta);
    case Extension::clip:
      return std::cos(std::min(std::max(phi, 0.0L), kPi));
    case Extension::monotonic: {
      const long double k = std::floor(phi / kPi);
      return (std::fmod(std::fabs(k), 2.0L) == 0 ? 1 : -1) * std::cos(phi) - 2 * k;
    }
    default:
      return std::cos(phi);
  }
}

long double psi(const MarginParameters& p, long double theta, long double m2, long double m3, long double mu) {
  return std::cos(theta) + mu * (extended(p, theta, m2) - m3 - std::cos(theta));
}

class EveryExtension : public testing::TestWithParam<Extension> {};

TEST_P(EveryExtension, ValueAndDerivativesMatchLongDouble) {
  const bool any_m1 =
      GetParam() != Extension::linear && GetParam() != Extension::easy && GetParam() != Extension::continuous;
  for (const double m1 : {1.0, 1.5, 4.0}) {
    if (m1 != 1.0 && !any_m1) {
      continue;
    }
    for (const double m2 : {-0.7, 0.0, 0.5, 2.0}) {
      for (const double mu : {0.0, 0.3, 1.0}) {
        for (double theta = 0.05; theta < 3.14; theta += 0.0917) {
          MarginParameters p;
          p.m1 = m1;
          p.extension = GetParam();
          const MarginValue value = apply_margin(p, at(theta), m2, 0.2, mu);
          const long double h = 1e-6L;
          const long double phi = m1 * static_cast<long double>(theta) + m2;
          // phi is rounded twice, a cosine or sine of it once (1 unit in the last place, 2 u).
          const double of_phi = kU * (2 * (m1 * theta + std::fabs(m2)) + 2);
          // Four sums, a product, and what is expected, of the sizes of E, m3 and twice the cosine (2 u).
          const double sizes = std::fabs(static_cast<double>(extended(p, theta, m2))) + std::fabs(m2) + 0.2 + 2;
          EXPECT_NEAR(value.psi, static_cast<double>(psi(p, theta, m2, 0.2L, mu)), mu * of_phi + kU * (6 + 2) * sizes);
          // A slope is m1 sin(phi), with a product for m1, mu, a sum, and what is expected. A central difference leaves
          // out h^2 / 6 times the third derivative and has psi's rounding in long double, over h.
          const double of_slope = (1 + m1) * (mu * of_phi + kU * (4 + 2)) + kU * sizes * 4;
          const double difference = 1e-12 / 6 * (1 + m1 * m1 * m1 + 3 + std::fabs(m2)) +
              8 * 0x1p-64 * (sizes + std::fabs(static_cast<double>(phi))) / 1e-6;
          const bool at_seam = std::fabs(std::remainder(phi, kPi)) < 1e-4L || std::fabs(theta - kPi / 2) < 1e-4L;
          if (at_seam) {
            continue;
          }
          EXPECT_NEAR(
              value.dtheta,
              static_cast<double>((psi(p, theta + h, m2, 0.2L, mu) - psi(p, theta - h, m2, 0.2L, mu)) / (2 * h)),
              of_slope + difference);
          EXPECT_NEAR(
              value.dm2,
              static_cast<double>((psi(p, theta, m2 + h, 0.2L, mu) - psi(p, theta, m2 - h, 0.2L, mu)) / (2 * h)),
              of_slope + difference);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Margin,
    EveryExtension,
    testing::Values(
        Extension::none,
        Extension::linear,
        Extension::easy,
        Extension::clip,
        Extension::monotonic,
        Extension::continuous));

TEST(Margin, WithoutAMarginEveryExtensionIsTheCosine) {
  for (const Extension extension :
       {Extension::none, Extension::linear, Extension::easy, Extension::clip, Extension::monotonic,
        Extension::continuous}) {
    MarginParameters p;
    p.extension = extension;
    for (const double theta : {0.0, 1e-9, 1.0, 2.0, static_cast<double>(kPi)}) {
      EXPECT_EQ(apply_margin(p, at(theta), 0.0, 0.0, 1.0).psi, std::cos(theta));
    }
  }
}

TEST(Margin, StraightThroughHasTheCosinesDerivative) {
  MarginParameters p = presets::arcface().margin;
  p.margin_gradient = MarginGradient::straight_through;
  EXPECT_EQ(apply_margin(p, at(1.0), 0.5, 0.0, 1.0).dtheta, -std::sin(1.0));
  // cos(1) + (cos(1.5) - cos(1)), the difference rounded.
  EXPECT_NEAR(apply_margin(p, at(1.0), 0.5, 0.0, 1.0).psi, std::cos(1.5), 2 * kU * std::cos(1.0));
}

TEST(Margin, MonotonicNeverRises) {
  MarginParameters p = presets::sphereface(4.0).margin;
  double before = 2.0;
  double last = 0.0; // 4 theta
  for (double theta = 0.0; theta <= 3.1415; theta += 1e-3) {
    const MarginValue value = apply_margin(p, at(theta), 0.0, 0.0, 1.0);
    EXPECT_LT(value.psi, before); // by 4e-6 at least: a step of 4e-3 across a multiple of pi
    EXPECT_LE(value.dtheta, 0.0);
    before = value.psi;
    last = 4 * theta;
  }
  // (-1)^3 cos(4 pi) - 2 * 3, where cos(x) >= 1 - x^2 / 2.
  EXPECT_GT(before, -7.0);
  EXPECT_LT(before, -7.0 + std::pow(4 * static_cast<double>(kPi) - last, 2) / 2);
}

} // namespace
