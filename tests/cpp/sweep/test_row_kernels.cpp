// The hot loops on one row against plain loops in long double, for every tail length.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "cpu/row_kernels.h"

namespace {

using namespace torchmargin::cpu;

template <typename T>
std::vector<T> random_row(int64_t size, double deviation, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0.0, deviation);
  std::vector<T> row(size);
  for (T& value : row) {
    value = static_cast<T>(normal(generator));
  }
  return row;
}

template <typename T>
class RowKernelsTest : public testing::Test {
 protected:
  const RowKernels<T>& kernels = row_kernels<T>();
  // A few roundings of T, the exponential's two units in the last place among them.
  static constexpr double kTolerance = 16 * std::numeric_limits<T>::epsilon();
};
using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(RowKernelsTest, Types);

TYPED_TEST(RowKernelsTest, SumBlockOfEveryLength) {
  using T = TypeParam;
  for (const bool bounded : {true, false}) {
    for (int64_t size = 0; size <= 70; ++size) {
      const auto dots = random_row<T>(size, 0.3, 1);
      const auto norms = random_row<T>(size, 1.0, 2);
      const auto bias = random_row<T>(size, 2.0, 3);
      const LogitMap<T> map{T(20), norms.data(), bounded ? nullptr : bias.data()};
      const BlockSum block = this->kernels.sum_block(dots.data(), size, map, bounded);
      long double sum = 0;
      long double largest = -std::numeric_limits<long double>::infinity();
      for (int64_t j = 0; j < size; ++j) {
        const long double z = static_cast<T>(dots[j] * (norms[j] * T(20))) + (bounded ? T(0) : bias[j]);
        sum += std::exp(z);
        largest = std::max(largest, z);
      }
      if (size == 0) {
        EXPECT_EQ(block.sum, 0.0);
        continue;
      }
      // A logit near 20 carries a rounding of 20 epsilon into its exponential.
      const double tolerance = this->kTolerance * 8;
      EXPECT_NEAR(block.maximum, static_cast<double>(largest), tolerance);
      EXPECT_NEAR(block.shift + std::log(block.sum), static_cast<double>(std::log(sum)), tolerance);
    }
  }
}

TYPED_TEST(RowKernelsTest, SumBlockWithNonFiniteLogits) {
  using T = TypeParam;
  const T infinity = std::numeric_limits<T>::infinity();
  std::vector<T> dots(37, T(1));
  std::vector<T> mask(37, -infinity);
  const LogitMap<T> masked{T(1), nullptr, mask.data()};
  const BlockSum none = this->kernels.sum_block(dots.data(), 37, masked, false);
  EXPECT_EQ(none.sum, 0.0);
  EXPECT_EQ(none.maximum, -std::numeric_limits<double>::infinity());
  for (const int64_t place : {0, 17, 36}) {
    std::vector<T> infinite = dots;
    infinite[place] = infinity;
    const BlockSum block = this->kernels.sum_block(infinite.data(), 37, {T(1), nullptr, nullptr}, false);
    EXPECT_EQ(block.shift + std::log(block.sum), std::numeric_limits<double>::infinity());
    infinite[(place + 1) % 37] = std::numeric_limits<T>::quiet_NaN();
    EXPECT_TRUE(std::isnan(this->kernels.sum_block(infinite.data(), 37, {T(1), nullptr, nullptr}, false).sum));
    std::vector<T> holed = dots;
    holed[place] = std::numeric_limits<T>::quiet_NaN();
    for (const bool bounded : {true, false}) {
      EXPECT_TRUE(std::isnan(this->kernels.sum_block(holed.data(), 37, {T(1), nullptr, nullptr}, bounded).sum));
    }
    EXPECT_TRUE(std::isnan(this->kernels.sum_block(holed.data(), 37, masked, false).sum));
  }
}

TYPED_TEST(RowKernelsTest, SoftmaxRowFlushesAndKeepsNan) {
  using T = TypeParam;
  for (const int64_t size : {1, 15, 16, 17, 64, 71}) {
    std::vector<T> dots(size, T(-3));
    dots[0] = T(-49.9);
    if (size > 2) {
      dots[size - 1] = T(-50.1);
      dots[size / 2] = std::numeric_limits<T>::quiet_NaN();
    }
    std::vector<T> out(size, T(7));
    this->kernels.softmax_row(dots.data(), out.data(), size, {T(1), nullptr, nullptr}, 0.0, false);
    EXPECT_NEAR(out[0] / std::exp(static_cast<long double>(dots[0])), 1.0, 100 * this->kTolerance);
    if (size > 2) {
      EXPECT_EQ(out[size - 1], T(0));
      EXPECT_TRUE(std::isnan(out[size / 2]));
      EXPECT_NEAR(out[1] * std::exp(3.0L), 1.0, this->kTolerance);
    }
  }
}

// The log-sum-exp is not rounded to T: a row whose lse lies between two numbers of T has no common factor of error.
TYPED_TEST(RowKernelsTest, SoftmaxRowTakesTheWholeLse) {
  using T = TypeParam;
  const double lse = 40.0 + 1.7e-6; // a float32 next to it is 2e-6 away
  for (const int64_t size : {1, 16, 37}) {
    const std::vector<T> dots(size, T(40) - T(0.25));
    std::vector<T> out(size);
    this->kernels.softmax_row(dots.data(), out.data(), size, {T(1), nullptr, nullptr}, lse, false);
    for (const T q : out) {
      EXPECT_NEAR(q / std::exp(static_cast<long double>(dots[0]) - lse), 1.0, this->kTolerance / 4);
    }
  }
}

TYPED_TEST(RowKernelsTest, NormsScalesAndProjections) {
  using T = TypeParam;
  for (const int64_t size : {1, 7, 8, 16, 33, 130}) {
    const auto row = random_row<T>(size, 1.0, 4);
    const auto w = random_row<T>(size, 1.0, 5);
    long double squared = 0;
    long double w_squared = 0;
    long double dot = 0;
    for (int64_t k = 0; k < size; ++k) {
      squared += static_cast<long double>(row[k]) * row[k];
      w_squared += static_cast<long double>(w[k]) * w[k];
      dot += static_cast<long double>(row[k]) * w[k];
    }
    EXPECT_NEAR(this->kernels.squared_norm(row.data(), size) / squared, 1.0, 1e-14);
    auto scaled = row;
    this->kernels.scale_row(scaled.data(), scaled.data(), size, 1.0 / 3.0);
    std::vector<double> sum(size, 1.0);
    this->kernels.add_row(sum.data(), row.data(), size, 2.0);
    std::vector<T> out(size);
    const T inverse = static_cast<T>(1.0L / std::sqrt(w_squared));
    this->kernels.project_row(row.data(), w.data(), out.data(), size, inverse, T(0.5));
    std::vector<T> plain(size);
    this->kernels.project_row(row.data(), w.data(), plain.data(), size, T(0), T(0.5));
    for (int64_t k = 0; k < size; ++k) {
      EXPECT_EQ(scaled[k], static_cast<T>(static_cast<double>(row[k]) * (1.0 / 3.0)));
      EXPECT_EQ(sum[k], 1.0 + 2.0 * row[k]);
      EXPECT_EQ(plain[k], row[k] * T(0.5));
      EXPECT_NEAR(out[k], static_cast<double>(0.5L * (row[k] - dot / w_squared * w[k])), this->kTolerance * size);
    }
  }
}

} // namespace
