// The angle between vectors against the same in long double, from 0 to pi and at both ends.
#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "math/angle.h"

namespace {

using torchmargin::Angle;
using torchmargin::angle_between;

constexpr long double kPi = 3.14159265358979323846264338327950288L;

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
    // Two roundings of unit vectors move the angle by at most a few units of 2^-53.
    EXPECT_NEAR(angle.theta, static_cast<double>(theta), 1e-15);
    EXPECT_NEAR(angle.cosine, static_cast<double>(std::cos(theta)), 4e-16);
    EXPECT_NEAR(angle.sine, static_cast<double>(std::sin(theta)), 1e-15);
  }
}

TEST(Angle, TangentIsTheUnitTangent) {
  for (const long double theta : {1e-6L, 0.3L, kPi / 2, 2.5L, kPi - 1e-6L}) {
    const Angle angle = plane_angle(theta);
    const double c = static_cast<double>(std::cos(theta));
    const double s = static_cast<double>(std::sin(theta));
    // At x = (1, 0) the tangent towards w = (c, s) is (0, 1); relative error 1e-16 / theta.
    const double tolerance = 4e-16 / std::min<double>(s, 1.0) + 1e-15;
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
