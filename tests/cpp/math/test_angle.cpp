// The angle between vectors against the same in long double, from 0 to pi and at both ends.
#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "math/angle.h"

namespace {

using torchmargin::Angle;
using torchmargin::angle_between;

constexpr long double kPi = 3.14159265358979323846264338327950288L;
constexpr double kU = 0x1p-53; // the unit roundoff

// Unit vectors in the plane at angles 0 and theta.
Angle plane_angle(long double theta) {
  const double x[2] = {1.0, 0.0};
  const double w[2] = {static_cast<double>(std::cos(theta)), static_cast<double>(std::sin(theta))};
  double delta = 0.0;
  double sigma = 0.0;
  for (int k = 0; k < 2; ++k) {
    delta += (x[k] - w[k]) * (x[k] - w[k]);
    sigma += (x[k] + w[k]) * (x[k] + w[k]);
  }
  return angle_between(delta, sigma);
}

TEST(Angle, MatchesLongDoubleEverywhere) {
  for (const long double theta :
       {1e-12L, 1e-8L, 1e-4L, 0.1L, 1.0L, kPi / 2, 2.0L, 3.0L, kPi - 1e-4L, kPi - 1e-8L, kPi - 1e-12L}) {
    const Angle angle = plane_angle(theta);
    const double t = static_cast<double>(theta);
    const double c = std::fabs(static_cast<double>(std::cos(theta)));
    const double s = static_cast<double>(std::sin(theta));
    // w is rounded: its length moves by u, its angle by u sin(2 theta) / 2 for each component. A squared length has 4 u
    // of its own (a difference, twice in its square, product, sum), a length 3 u.
    // theta: both lengths' 6 u, times the sine; w's angle, and u sine of second order where it is 1e-8 from an end;
    // atan2 is good to 2 u, and what is expected is rounded.
    EXPECT_NEAR(angle.theta, t, kU * ((6 + 2 * c + 1) * s + 3 * t));
    // cosine: half of the smaller squared length, 2 - 2 c, with w's length; w's angle; the difference, and what is
    // expected.
    EXPECT_NEAR(angle.cosine, static_cast<double>(std::cos(theta)), kU * (5 * (1 - c) + 2 * c * s * s + 2));
    // sine: both lengths', w's length and angle, the second order, a product, and what is expected.
    EXPECT_NEAR(angle.sine, s, kU * (6 + 1 + 2 * c * c + 1 + 2) * s);
  }
}

TEST(Angle, TangentIsTheUnitTangent) {
  for (const long double theta : {1e-6L, 0.3L, kPi / 2, 2.5L, kPi - 1e-6L}) {
    const Angle angle = plane_angle(theta);
    const double c = static_cast<double>(std::cos(theta));
    const double s = static_cast<double>(std::sin(theta));
    // Of ((other +- self) -+ half self) / sine: w is rounded, a sum or difference of size m and another are, half has 5
    // u of m^2 / 2 and its product one more; the sine has 12 u, its inverse and the last product one each, what is
    // expected one.
    const double m = std::sqrt(2 - 2 * std::fabs(c));
    const double tolerance = kU * ((1 + 2 * m + 3 * m * m) / s + 15);
    // At x = (1, 0) the tangent towards w = (c, s) is (0, 1).
    EXPECT_NEAR(angle.tangent(1.0, c), 0.0, tolerance);
    EXPECT_NEAR(angle.tangent(0.0, s), 1.0, tolerance);
    // At w the tangent towards x is (s, -c).
    EXPECT_NEAR(angle.tangent(c, 1.0), s, tolerance);
    EXPECT_NEAR(angle.tangent(s, 0.0), -c, tolerance);
  }
}

TEST(Angle, ParallelAndAntiparallelAreExact) {
  const Angle zero = angle_between(1e-31, 4.0);
  EXPECT_EQ(zero.theta, 0.0);
  EXPECT_EQ(zero.cosine, 1.0);
  EXPECT_EQ(zero.tangent(0.6, 0.6), 0.0);
  const Angle straight = angle_between(4.0, 1e-31);
  EXPECT_EQ(straight.theta, static_cast<double>(kPi));
  EXPECT_EQ(straight.cosine, -1.0);
  EXPECT_EQ(straight.tangent(0.6, -0.6), 0.0);
}

TEST(Angle, ZeroVectorIsAtARightAngle) {
  const Angle right = torchmargin::right_angle();
  EXPECT_EQ(right.theta, static_cast<double>(kPi / 2));
  EXPECT_EQ(right.tangent(0.0, 0.25), 0.25); // the other vector
}

TEST(Angle, InverseNorm) {
  EXPECT_EQ(torchmargin::inverse_norm(4.0), 0.5);
  EXPECT_EQ(torchmargin::inverse_norm(0.0), 0.0);
  EXPECT_EQ(torchmargin::inverse_norm(0.99e-24), 0.0);
  EXPECT_GT(torchmargin::inverse_norm(1.01e-24), 0.0);
  EXPECT_TRUE(std::isnan(torchmargin::inverse_norm(INFINITY)));
  EXPECT_TRUE(std::isnan(torchmargin::inverse_norm(NAN)));
}

} // namespace
