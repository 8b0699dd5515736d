// Combining partial sums in any grouping gives the log-sum-exp of all terms.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "math/online_lse.h"

namespace {

using torchmargin::OnlineLse;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

OnlineLse of(const std::vector<double>& terms, size_t begin, size_t end) {
  OnlineLse total;
  for (size_t i = begin; i < end; ++i) {
    total.combine({terms[i], 1.0});
  }
  return total;
}

TEST(OnlineLse, AnyGroupingMatchesLongDouble) {
  std::mt19937 generator(7);
  std::normal_distribution<double> normal(0.0, 40.0);
  std::vector<double> terms(1000);
  for (double& term : terms) {
    term = normal(generator);
  }
  long double largest = -kInfinity;
  for (const double term : terms) {
    largest = std::max<long double>(largest, term);
  }
  long double sum = 0;
  for (const double term : terms) {
    sum += std::exp(static_cast<long double>(term) - largest);
  }
  const double expected = static_cast<double>(largest + std::log(sum));
  // A sum for each term; where the shift grows, a difference of shifts, an exponential (1 unit in the last place, 2 u)
  // and a product, at most once a term, and the differences make the range of the terms. Then the logarithm, the shift,
  // and what is expected.
  const double range = static_cast<double>(largest) - *std::min_element(terms.begin(), terms.end());
  const double tolerance =
      0x1p-53 * ((1 + 3) * static_cast<double>(terms.size()) + range + 4 * (1 + std::fabs(expected)));
  for (const size_t step : {1, 3, 64, 999, 1000}) {
    OnlineLse total;
    for (size_t begin = 0; begin < terms.size(); begin += step) {
      total.combine(of(terms, begin, std::min(begin + step, terms.size())));
    }
    EXPECT_NEAR(total.project(), expected, tolerance);
  }
}

TEST(OnlineLse, EmptySumsAreNeutral) {
  EXPECT_EQ(OnlineLse{}.project(), -kInfinity);
  OnlineLse total{};
  total.combine(OnlineLse{});
  EXPECT_EQ(total.project(), -kInfinity);
  total.combine({3.0, 1.0});
  total.combine(OnlineLse{});
  EXPECT_EQ(total.project(), 3.0);
}

TEST(OnlineLse, ASharedShiftOfZeroJustAdds) {
  OnlineLse total;
  total.combine({0.0, 2.0});
  total.combine({0.0, 3.0});
  EXPECT_EQ(total.sum, 5.0);
  EXPECT_EQ(total.shift, 0.0);
}

TEST(OnlineLse, AnInfiniteTermIsAnInfiniteResult) {
  // As a shift, and as a sum beside a finite shift; rescaling either must not make inf * 0 of it.
  for (const OnlineLse infinite : {OnlineLse{kInfinity, 1.0}, OnlineLse{0.0, kInfinity}}) {
    for (const double other : {-2000.0, 0.0, 2000.0}) {
      for (const bool first : {true, false}) {
        OnlineLse total;
        total.combine(first ? infinite : OnlineLse{other, 1.0});
        total.combine(first ? OnlineLse{other, 1.0} : infinite);
        total.combine(infinite);
        EXPECT_EQ(total.project(), kInfinity);
        total.combine({0.0, std::nan("")});
        EXPECT_TRUE(std::isnan(total.project()));
      }
    }
  }
}

TEST(OnlineLse, NanReachesTheResult) {
  for (const bool first : {true, false}) {
    OnlineLse total;
    const OnlineLse bad{-kInfinity, std::nan("")};
    if (first) {
      total.combine(bad);
    }
    total.combine({1.0, 1.0});
    if (!first) {
      total.combine(bad);
    }
    EXPECT_TRUE(std::isnan(total.project()));
  }
}

} // namespace
