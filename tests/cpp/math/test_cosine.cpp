// psi as a function of the cosine against long double, and its derivative against differences.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "math/cosine.h"

namespace {

using namespace torchmargin;

constexpr double kPi = 3.14159265358979323846;
const std::vector<Extension> kExtensions{Extension::none, Extension::linear,    Extension::easy,
                                         Extension::clip, Extension::monotonic, Extension::continuous};

MarginParameters margin(Extension extension, double m1) {
  MarginParameters parameters;
  parameters.m1 = m1;
  parameters.extension = extension;
  return parameters;
}

TEST(Cosine, AngleHasAllItsDigits) {
  for (const double cosine : {-1.0, -0.999999999, -0.3, 0.0, 0.7, 0.999999999999, 1.0}) {
    const Angle angle = angle_of_cosine(cosine);
    const long double theta = std::acos(static_cast<long double>(cosine));
    const double t = static_cast<double>(theta);
    const double s = static_cast<double>(std::sin(theta));
    // 1 - c and 1 + c have a rounding, their roots 1.5, and the angle those of both, times the sine; atan2 is good to
    // 2 u, and what is expected is rounded. The sine: half of both and of their product, root, and what is expected. At
    // the ends long double has no pi.
    EXPECT_NEAR(angle.theta, t, 0x1p-53 * (3 * s + 3 * t)) << cosine;
    EXPECT_NEAR(angle.sine, s, 0x1p-53 * 3.5 * s + 0x1p-62) << cosine;
  }
}

TEST(Cosine, PastTheEndsCountsAsTheEnds) {
  for (const Extension extension : kExtensions) {
    for (const double end : {1.0, -1.0}) {
      const auto at = apply_margin_to_cosine(margin(extension, 1.0), end, 0.4, 0.1, 0.8);
      const auto past = apply_margin_to_cosine(margin(extension, 1.0), 1.01 * end, 0.4, 0.1, 0.8);
      EXPECT_EQ(at.psi, past.psi);
      EXPECT_EQ(at.dcosine, past.dcosine);
      EXPECT_TRUE(std::isfinite(at.dcosine));
    }
  }
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_TRUE(std::isnan(apply_margin_to_cosine(margin(Extension::none, 1.0), nan, 0.4, 0.1, 1.0).psi));
}

TEST(Cosine, DerivativesAreThoseOfTheValue) {
  const double h = 1e-6;
  // psi's error, some 48 roundings of parts of up to 8 in all, over h: 4.3e-8. What a central difference leaves out,
  // h^2 / 6 times the third derivative, is 9e-9 at most where the sine is 0.17 or more.
  const double tolerance = 48 * 8 * 0x1p-53 / h + 1e-8;
  for (const Extension extension : kExtensions) {
    for (const double m1 : {1.0, 2.5}) {
      if (m1 != 1.0 &&
          (extension == Extension::linear || extension == Extension::easy || extension == Extension::continuous)) {
        continue;
      }
      const MarginParameters parameters = margin(extension, m1);
      const auto value = [&](double c, double m2) { return apply_margin_to_cosine(parameters, c, m2, 0.1, 0.7).psi; };
      for (double cosine = -0.985; cosine < 0.99; cosine += 0.0517) {
        const auto at = apply_margin_to_cosine(parameters, cosine, 0.3, 0.1, 0.7);
        const double slope = (value(cosine + h, 0.3) - value(cosine - h, 0.3)) / (2 * h);
        const double slope_m2 = (value(cosine, 0.3 + h) - value(cosine, 0.3 - h)) / (2 * h);
        if (std::fabs(slope) < 100) { // not across a jump
          EXPECT_NEAR(at.dcosine, slope, tolerance * (1 + std::fabs(slope))) << int(extension) << " " << cosine;
        }
        if (std::fabs(slope_m2) < 100) {
          EXPECT_NEAR(at.dm2, slope_m2, tolerance) << int(extension) << " " << cosine;
        }
      }
    }
  }
}

// At 1 - 1e-12 the angle to the end is 1.4e-6, and the slope nearer to its limit than 1e-10; but m1 sin(phi) has m1 = 3
// times phi's error, 3 times that of theta near pi (4 units of 2^-53) and its own rounding near 3 pi (8 of them), and
// is divided by that angle.
TEST(Cosine, TheSlopeAtTheEndsIsTheLimit) {
  const double tolerance = 3 * (3 * 4 + 8) * 0x1p-53 / 1.4e-6 + 1e-10;
  for (const double m1 : {1.0, 2.0, 3.0}) {
    for (const Extension extension : {Extension::none, Extension::monotonic}) {
      const MarginParameters parameters = margin(extension, m1);
      for (const double end : {1.0, -1.0}) {
        const double near = apply_margin_to_cosine(parameters, end * (1 - 1e-12), 0.0, 0.2, 1.0).dcosine;
        const double at = apply_margin_to_cosine(parameters, end, 0.0, 0.2, 1.0).dcosine;
        EXPECT_NEAR(at, near, tolerance) << m1 << " " << int(extension) << " " << end;
      }
    }
  }
}

} // namespace
