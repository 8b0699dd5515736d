// The hot loops on one row against plain loops in long double, for every tail length.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "cpu/row_kernels.h"
#include "math/angle.h"

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
  static constexpr double kU = std::numeric_limits<T>::epsilon() / 2; // the unit roundoff
  static constexpr double kExp = 4 * kU; // two units in the last place (cpu/simd.h)
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
      long double parts = 0; // of the largest logit
      for (int64_t j = 0; j < size; ++j) {
        const long double product = static_cast<long double>(dots[j]) * norms[j] * 20;
        const long double z = product + (bounded ? 0 : bias[j]);
        sum += std::exp(z);
        largest = std::max(largest, z);
        parts = std::max(parts, std::fabs(product) + (bounded ? 0 : std::fabs(bias[j])));
      }
      if (size == 0) {
        EXPECT_EQ(block.sum, 0.0);
        continue;
      }
      // Two factors, a bias, and what is expected: four roundings of a logit, and one of its difference to the shift,
      // which is twice its size at most. At most size - 1 sums of exponentials. The logarithm and what is added to it
      // are float64.
      const double logit = 4 * this->kU * static_cast<double>(parts);
      const double lse = logit + 2 * this->kU * static_cast<double>(parts) + this->kExp +
          static_cast<double>(size) * this->kU + 4 * 0x1p-53 * static_cast<double>(1 + parts + std::log(size));
      EXPECT_NEAR(block.maximum, static_cast<double>(largest), logit);
      EXPECT_NEAR(block.shift + std::log(block.sum), static_cast<double>(std::log(sum)), lse);
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
    EXPECT_NEAR(out[0] / std::exp(static_cast<long double>(dots[0])), 1.0, this->kExp);
    if (size > 2) {
      EXPECT_EQ(out[size - 1], T(0));
      EXPECT_TRUE(std::isnan(out[size / 2]));
      EXPECT_NEAR(out[1] * std::exp(3.0L), 1.0, this->kExp);
    }
  }
}

// From what is flushed to where a sum of bounded logits ends (scale 71).
TYPED_TEST(RowKernelsTest, ExponentialIsWithinTwoUnitsInTheLastPlace) {
  using T = TypeParam;
  std::vector<T> dots;
  for (double z = -49.99; z < 71.0; z += 0.00173) {
    dots.push_back(static_cast<T>(z));
  }
  const auto count = static_cast<int64_t>(dots.size());
  std::vector<T> out(dots.size());
  this->kernels.softmax_row(dots.data(), out.data(), count, {T(1), nullptr, nullptr}, 0.0, false);
  for (size_t j = 0; j < dots.size(); ++j) {
    ASSERT_NEAR(out[j] / std::exp(static_cast<long double>(dots[j])), 1.0, this->kExp) << dots[j];
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
    // The exponential; 39.75 - 40 is exact, what the lower part makes of it is rounded.
    for (const T q : out) {
      EXPECT_NEAR(q / std::exp(static_cast<long double>(dots[0]) - lse), 1.0, this->kExp + this->kU / 4);
    }
  }
}

// What `count` roundings to float64 do to a sum of terms of this size, at most (Higham, Accuracy and Stability of
// Numerical Algorithms, section 3.1), and what those of the reference do: one more.
long double rounding(int64_t count, long double size) {
  return static_cast<long double>(count + 1) * 0x1p-53L * size;
}

void expect_within(double got, long double expected, long double bound) {
  EXPECT_LE(std::fabs(got - expected), bound) << got << " is not " << static_cast<double>(expected);
}

constexpr int64_t kLongest = 70; // several vectors of every instruction set, and every tail

TYPED_TEST(RowKernelsTest, SumsOfProducts) {
  using T = TypeParam;
  for (int64_t size = 0; size <= kLongest; ++size) {
    const auto x = random_row<T>(size, 1.0, 4);
    const auto w = random_row<T>(size, 2.0, 5);
    const auto wide = random_row<double>(size, 3.0, 6);
    const double inverse_x = 0.3;
    const double inverse_w = -0.7;
    long double squared = 0, product = 0, product_size = 0;
    long double apart = 0, together = 0, most = 0;
    for (int64_t k = 0; k < size; ++k) {
      squared += static_cast<long double>(x[k]) * x[k];
      product += static_cast<long double>(wide[k]) * w[k];
      product_size += std::fabs(static_cast<long double>(wide[k]) * w[k]);
      const long double unit_x = static_cast<long double>(x[k]) * inverse_x;
      const long double unit_w = static_cast<long double>(w[k]) * inverse_w;
      apart += (unit_x - unit_w) * (unit_x - unit_w);
      together += (unit_x + unit_w) * (unit_x + unit_w);
      most += (std::fabs(unit_x) + std::fabs(unit_w)) * (std::fabs(unit_x) + std::fabs(unit_w));
    }
    // A product is rounded, and added at most size - 1 times.
    expect_within(this->kernels.squared_norm(x.data(), size), squared, rounding(size, squared));
    expect_within(this->kernels.dot(wide.data(), w.data(), size), product, rounding(size, product_size));
    // Two roundings make a difference, and count twice in its square.
    double difference = -1.0;
    double sum = -1.0;
    this->kernels.distances(x.data(), w.data(), size, inverse_x, inverse_w, &difference, &sum);
    expect_within(difference, apart, rounding(size + 4, most));
    expect_within(sum, together, rounding(size + 4, most));
  }
}

// Contracted to an FMA, x - x is the rounding of one of them: still parallel.
TYPED_TEST(RowKernelsTest, DistancesOfParallelRows) {
  using T = TypeParam;
  for (int64_t size = 1; size <= kLongest; ++size) {
    const auto x = random_row<T>(size, 1.0, 7);
    auto opposite = x;
    this->kernels.scale_row(x.data(), opposite.data(), size, -1.0);
    const double inverse = 1.0 / std::sqrt(this->kernels.squared_norm(x.data(), size));
    double difference = -1.0;
    double sum = -1.0;
    this->kernels.distances(x.data(), x.data(), size, inverse, inverse, &difference, &sum);
    EXPECT_LE(std::sqrt(difference), torchmargin::kParallel);
    this->kernels.distances(x.data(), opposite.data(), size, inverse, inverse, &difference, &sum);
    EXPECT_LE(std::sqrt(sum), torchmargin::kParallel);
  }
}

TYPED_TEST(RowKernelsTest, ScaledWidenedAndNarrowedRows) {
  using T = TypeParam;
  const double factor = 1.0 / 3.0;
  for (int64_t size = 0; size <= kLongest; ++size) {
    auto row = random_row<T>(size, 1.0, 8);
    auto wide = random_row<double>(size, 1.0, 9);
    if (size > 2) {
      row[size / 2] = std::numeric_limits<T>::quiet_NaN();
      wide[size - 1] = std::numeric_limits<double>::infinity();
      wide[size / 2] = std::numeric_limits<double>::quiet_NaN();
    }
    // What lies behind a row must stay.
    std::vector<T> scaled(size + 1, T(7)), narrowed(size + 1, T(7)), in_place = row;
    std::vector<double> widened(size + 1, 7.0);
    in_place.push_back(T(7));
    this->kernels.scale_row(row.data(), scaled.data(), size, factor);
    this->kernels.scale_row(in_place.data(), in_place.data(), size, factor);
    this->kernels.widen_row(row.data(), widened.data(), size, factor);
    this->kernels.narrow_row(wide.data(), narrowed.data(), size);
    for (int64_t k = 0; k < size; ++k) {
      if (std::isnan(row[k])) {
        EXPECT_TRUE(std::isnan(scaled[k]) && std::isnan(in_place[k]) && std::isnan(widened[k]));
        EXPECT_TRUE(std::isnan(narrowed[k]));
        continue;
      }
      EXPECT_EQ(widened[k], static_cast<double>(row[k]) * factor);
      EXPECT_EQ(scaled[k], static_cast<T>(static_cast<double>(row[k]) * factor));
      EXPECT_EQ(in_place[k], scaled[k]);
      EXPECT_EQ(narrowed[k], static_cast<T>(wide[k]));
    }
    EXPECT_EQ(scaled[size], T(7));
    EXPECT_EQ(in_place[size], T(7));
    EXPECT_EQ(widened[size], 7.0);
    EXPECT_EQ(narrowed[size], T(7));
  }
}

TYPED_TEST(RowKernelsTest, AddRow) {
  using T = TypeParam;
  for (int64_t size = 0; size <= kLongest; ++size) {
    const auto row = random_row<T>(size, 1.0, 10);
    const auto before = random_row<double>(size, 1.0, 11);
    auto sum = before;
    sum.push_back(7.0);
    this->kernels.add_row(sum.data(), row.data(), size, 0.3);
    for (int64_t k = 0; k < size; ++k) {
      const long double added = static_cast<long double>(0.3) * row[k];
      expect_within(sum[k], before[k] + added, rounding(2, std::fabs(before[k]) + std::fabs(added)));
    }
    EXPECT_EQ(sum[size], 7.0);
  }
}

// What the term is, and the size of the parts that it is the sum of.
struct Term {
  long double value;
  long double size;
};

template <typename T>
Term tangent_term(T self, T other, const TangentTerm& term) {
  const long double s = static_cast<long double>(self) * term.inverse_self;
  const long double o = static_cast<long double>(other) * term.inverse_other;
  const long double tangent = ((o + term.sign * s) - term.sign * term.half * s) * term.inverse_sine;
  const long double tangent_size = (std::fabs(o) + std::fabs(s) * (1 + term.half)) * term.inverse_sine;
  return {
      term.factor * (term.radial * s - term.dtheta * tangent),
      std::fabs(term.factor) * (std::fabs(term.radial * s) + std::fabs(term.dtheta) * tangent_size)};
}

constexpr TangentTerm kTerm{
    .inverse_self = 0.3,
    .inverse_other = 0.6,
    .sign = -1.0,
    .half = 0.35,
    .inverse_sine = 1.2,
    .factor = -1.7,
    .radial = 0.8,
    .dtheta = -0.9};
// A unit component, sum, difference, three factors, difference, sum: what is rounded on the longest way of a part.
constexpr int64_t kTermRoundings = 8;

TYPED_TEST(RowKernelsTest, AddTangent) {
  using T = TypeParam;
  for (const double sign : {-1.0, 1.0, 0.0}) { // 0: a right angle's
    TangentTerm given = kTerm;
    given.sign = sign;
    for (int64_t size = 0; size <= kLongest; ++size) {
      auto self = random_row<T>(size, 1.0, 12);
      const auto other = random_row<T>(size, 2.0, 13);
      if (size > 2) {
        self[size / 2] = std::numeric_limits<T>::quiet_NaN();
      }
      const auto before = random_row<double>(size, 1.0, 14);
      auto sum = before;
      sum.push_back(7.0);
      this->kernels.add_tangent(sum.data(), self.data(), other.data(), size, given);
      for (int64_t k = 0; k < size; ++k) {
        if (std::isnan(self[k])) {
          EXPECT_TRUE(std::isnan(sum[k]));
          continue;
        }
        const Term term = tangent_term(self[k], other[k], given);
        expect_within(sum[k], before[k] + term.value, rounding(kTermRoundings, std::fabs(before[k]) + term.size));
      }
      EXPECT_EQ(sum[size], 7.0);
    }
  }
}

// With and without smoothing, projection and a term of the target's.
template <typename T>
void check_finish_row(int64_t size, bool smoothed, bool project, bool own) {
  const auto self = random_row<T>(size, 1.0, 15);
  const auto other = random_row<T>(size, 2.0, 16);
  const auto products = random_row<T>(size, 3.0, 17);
  const auto sum = random_row<double>(size, 2.0, 18);
  TangentTerm given = kTerm;
  given.factor = own ? kTerm.factor : 0.0;
  const RowGradient gradient{
      .outer = 1.9,
      .unscale = 0.7,
      .smoothing = smoothed ? -0.4 : 0.0,
      .sum = smoothed ? sum.data() : nullptr,
      .project = project};
  auto got = products;
  got.push_back(T(7));
  row_kernels<T>().finish_row(got.data(), self.data(), own ? other.data() : nullptr, size, gradient, given);
  std::vector<Term> others(size);
  Term along{};
  for (int64_t k = 0; k < size; ++k) {
    const long double product = static_cast<long double>(products[k]) * gradient.unscale;
    const long double smoothing = smoothed ? static_cast<long double>(sum[k]) * gradient.smoothing : 0.0L;
    others[k] = {product + smoothing, std::fabs(product) + std::fabs(smoothing)};
    const long double squared = static_cast<long double>(given.inverse_self) * given.inverse_self;
    along.value += project ? others[k].value * self[k] * squared : 0.0L;
    along.size += project ? others[k].size * std::fabs(self[k]) * squared : 0.0L;
  }
  for (int64_t k = 0; k < size; ++k) {
    const Term term = own ? tangent_term(self[k], other[k], given) : Term{};
    const long double expected = gradient.outer * (others[k].value - along.value * self[k] + term.value);
    const long double all = gradient.outer * (others[k].size + along.size * std::fabs(self[k]) + term.size);
    // The longest way is that of the part along x: two roundings of another's, a product, size - 1 sums, three factors,
    // difference, sum and factor. Then one to T.
    const long double bound = rounding(std::max(size + 8, kTermRoundings + 1), all);
    expect_within(got[k], expected, bound + std::numeric_limits<T>::epsilon() / 2 * (std::fabs(expected) + bound));
  }
  EXPECT_EQ(got[size], T(7));
}

TYPED_TEST(RowKernelsTest, FinishRow) {
  for (int64_t size = 0; size <= kLongest; ++size) {
    for (const bool smoothed : {false, true}) {
      for (const bool project : {false, true}) {
        for (const bool own : {false, true}) {
          check_finish_row<TypeParam>(size, smoothed, project, own);
        }
      }
    }
  }
}

// NaN in one place is NaN there, and wherever a sum over the row goes.
TYPED_TEST(RowKernelsTest, NanStaysInItsPlaceButForSums) {
  using T = TypeParam;
  const T nan = std::numeric_limits<T>::quiet_NaN();
  for (int64_t size = 1; size <= kLongest; ++size) {
    for (const int64_t place : {int64_t{0}, size / 2, size - 1}) {
      const std::vector<T> ones(size, T(1));
      const std::vector<double> wide(size, 1.0);
      std::vector<T> holed = ones;
      holed[place] = nan;
      double difference = 0.0;
      double sum = 0.0;
      this->kernels.distances(ones.data(), holed.data(), size, 1.0, 1.0, &difference, &sum);
      EXPECT_TRUE(std::isnan(difference) && std::isnan(sum));
      EXPECT_TRUE(std::isnan(this->kernels.squared_norm(holed.data(), size)));
      EXPECT_TRUE(std::isnan(this->kernels.dot(wide.data(), holed.data(), size)));
      std::vector<double> added(size, 1.0);
      this->kernels.add_row(added.data(), holed.data(), size, 2.0);
      for (const bool project : {false, true}) {
        std::vector<T> products = holed;
        TangentTerm none{};
        none.inverse_self = 1.0;
        this->kernels.finish_row(products.data(), ones.data(), nullptr, size, {1.0, 1.0, 0.0, nullptr, project}, none);
        for (int64_t k = 0; k < size; ++k) {
          EXPECT_EQ(std::isnan(products[k]), project || k == place);
          EXPECT_EQ(std::isnan(added[k]), k == place);
        }
      }
    }
  }
}

TYPED_TEST(RowKernelsTest, Projections) {
  using T = TypeParam;
  for (const int64_t size : {1, 7, 8, 16, 33, 130}) {
    const auto row = random_row<T>(size, 1.0, 4);
    const auto w = random_row<T>(size, 1.0, 5);
    long double w_squared = 0;
    long double dot = 0;
    long double dot_size = 0;
    for (int64_t k = 0; k < size; ++k) {
      w_squared += static_cast<long double>(w[k]) * w[k];
      dot += static_cast<long double>(row[k]) * w[k];
      dot_size += std::fabs(static_cast<long double>(row[k]) * w[k]);
    }
    std::vector<T> out(size);
    const T inverse = static_cast<T>(1.0L / std::sqrt(w_squared));
    this->kernels.project_row(row.data(), w.data(), out.data(), size, inverse, T(0.5));
    std::vector<T> plain(size);
    this->kernels.project_row(row.data(), w.data(), plain.data(), size, T(0), T(0.5));
    for (int64_t k = 0; k < size; ++k) {
      EXPECT_EQ(plain[k], row[k] * T(0.5));
      // Of the part along w: `size` roundings of the dot product, the inverse norm's twice, three products, the
      // difference, and what is expected. Halving is exact.
      const long double parts = 0.5L * (std::fabs(row[k]) + dot_size / w_squared * std::fabs(w[k]));
      EXPECT_NEAR(
          out[k], static_cast<double>(0.5L * (row[k] - dot / w_squared * w[k])),
          static_cast<double>(size + 7) * this->kU * static_cast<double>(parts));
    }
  }
}

} // namespace
