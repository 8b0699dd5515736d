// The CUDA kernels, compiled for the host and run thread by thread, against the CPU's kernels:
// every kernel, every dtype, odd sizes, tails, many blocks.
#include <gtest/gtest.h>

#include <tuple>

#include "cpu/cosine_kernels.h"
#include "cpu/range_kernels.h"
#include "kernel_problem.h"
#include "kernels/launch.h"
#include "math/logit.h"
#include "math/online_lse.h"
#include "rounding.h"

namespace {

using namespace torchmargin;
using namespace torchmargin::testing;

template <typename Pair>
class DeviceKernels : public ::testing::Test {};

using Types = ::testing::Types<
    std::tuple<double, double>,
    std::tuple<float, float>,
    std::tuple<c10::Half, float>,
    std::tuple<c10::BFloat16, float>>;
TYPED_TEST_SUITE(DeviceKernels, Types);

#define TORCHMARGIN_TYPES                            \
  using Scalar = std::tuple_element_t<0, TypeParam>; \
  using T = std::tuple_element_t<1, TypeParam>;      \
  [[maybe_unused]] constexpr c10::ScalarType kAcc = dtype_of<T>;

// Rows, features, classes: fewer than a warp, one more than a warp, more than a block, several slices, rows that begin
// at 16 bytes and others.
constexpr std::array<std::array<int64_t, 3>, 5> kSizes{
    {{1, 1, 1}, {5, 31, 33}, {13, 70, 300}, {9, 300, 1100}, {6, 264, 2120}}};

// The dtype of the operands that such parameters have on a GPU, beside acc.
template <typename Scalar>
using Narrow = std::conditional_t<std::is_same_v<Scalar, float>, c10::Half, Scalar>;

// Of the parts of a logit. T: acc.
template <typename T>
double size_of_logit(const ProductsTile& tile, int64_t i, int64_t j) {
  const auto element = [](const void* of, int64_t k, double otherwise) {
    return of == nullptr ? otherwise : std::fabs(static_cast<double>(static_cast<const T*>(of)[k]));
  };
  return element(tile.products, i * tile.row_stride + j, 0.0) * tile.scale * element(tile.row_factors, i, 1.0) *
      element(tile.class_factors, j, 1.0) +
      element(tile.bias, j, 0.0);
}

// Loads rows of `input`, given transposed if `strided`, to Out.
template <typename Out, typename Scalar, typename T>
void check_load_rows(const KernelProblem<Scalar, T>& p, bool unit, bool weighted, bool strided) {
  const double operand_scale = 0.5;
  std::vector<Scalar> transposed(p.input.size());
  for (int64_t i = 0; i < p.rows; ++i) {
    for (int64_t k = 0; k < p.features; ++k) {
      transposed[k * p.rows + i] = p.input[i * p.features + k];
    }
  }
  const int64_t row_length = p.features + 5; // what lies behind a row must stay
  const auto run = [&](auto zero, const RawMatrix& rows, auto load) {
    using To = decltype(zero);
    std::vector<To> out(p.rows * row_length, To(7));
    std::vector<T> norms(p.rows);
    std::vector<double> sum(p.features, 1.0);
    load(LoadRowsArgs{
        .rows = rows,
        .row_count = p.rows,
        .features = p.features,
        .measured = true,
        .out = out.data(),
        .out_dtype = dtype_of<To>,
        .out_row_stride = row_length,
        .to_unit = unit,
        .row_factor = weighted ? p.upstream.data() : nullptr,
        .operand_scale = weighted ? &operand_scale : nullptr,
        .inverse_norms = norms.data(),
        .sum = sum.data()});
    return std::tuple(out, norms, sum);
  };
  constexpr c10::ScalarType acc = dtype_of<T>;
  const RawMatrix source = strided ? RawMatrix{transposed.data(), dtype_of<Scalar>, 1, p.rows}
                                   : RawMatrix{p.input.data(), dtype_of<Scalar>, p.features, 1};
  const auto got = run(Out(), source, [&](const LoadRowsArgs& args) { device::launch_load_rows(args, acc, nullptr); });
  const auto expected = run(T(), {p.wide_input.data(), acc, p.features, 1}, [&](const LoadRowsArgs& args) {
    cpu::load_rows_range(args, acc, 0, p.rows);
    cpu::sum_rows_range(args, acc, 0, p.features);
  });
  const auto& [out, norms, sum] = expected;
  // An inverse norm and two factors in float64; 16 bits take a factor and a product in float32 instead.
  const int64_t factor = inverse_norm_roundings(p.features) + 2;
  const double element = rounding(factor, 1.0) + (sizeof(Out) == 2 ? 2 * kUnitRoundoff<float> : 0.0);
  expect_all_within(
      std::get<0>(got), out, [&](int64_t k) { return element * std::fabs(static_cast<double>(out[k])); }, "rows");
  expect_all_within(
      std::get<1>(got), norms, [&](int64_t i) { return rounding(factor - 2, static_cast<double>(norms[i])); },
      "inverse norms");
  // A norm in T, a factor, a product, and a sum for each row.
  const double term = rounding(factor + p.rows, 1.0) + rounding<T>(1, 1.0);
  const auto sum_bound = [&](int64_t k) {
    double size = 1.0; // what stood there
    for (int64_t i = 0; i < p.rows; ++i) {
      const double given = weighted ? p.upstream[i] : 1.0;
      size += given == 0.0 ? 0.0 : std::fabs(p.wide_input[i * p.features + k] * given * norms[i]);
    }
    return term * size;
  };
  expect_all_within(std::get<2>(got), sum, sum_bound, "sum");
}

TYPED_TEST(DeviceKernels, LoadRows) {
  TORCHMARGIN_TYPES
  for (const auto& [rows, features, classes] : kSizes) {
    KernelProblem<Scalar, T> p(rows, features, classes);
    if (rows > 4) {
      p.input[4 * features] = std::numeric_limits<Scalar>::quiet_NaN(); // a row without an upstream gradient
      p.wide_input[4 * features] = std::numeric_limits<T>::quiet_NaN();
    }
    for (const bool weighted : {false, true}) {
      for (const bool unit : {false, true}) {
        check_load_rows<T>(p, unit, weighted, /*strided=*/unit);
        check_load_rows<Narrow<Scalar>>(p, unit, weighted, /*strided=*/!unit);
      }
    }
  }
}

// Norms that were taken before give the same operands, to the bit where these are of 16 bits.
TYPED_TEST(DeviceKernels, LoadRowsByNormsThatAreKnown) {
  TORCHMARGIN_TYPES
  for (const auto& [rows, features, classes] : kSizes) {
    const KernelProblem<Scalar, T> p(rows, features, classes);
    using Out = Narrow<Scalar>;
    std::vector<T> norms(rows);
    std::vector<Out> taken(rows * features), known(rows * features);
    LoadRowsArgs args{};
    args.rows = {p.input.data(), dtype_of<Scalar>, features, 1};
    args.row_count = rows;
    args.features = features;
    args.measured = true;
    args.out_dtype = dtype_of<Out>;
    args.out_row_stride = features;
    args.to_unit = true;
    args.out = taken.data();
    args.inverse_norms = norms.data();
    device::launch_load_rows(args, kAcc, nullptr);
    args.out = known.data();
    args.inverse_norms = nullptr;
    args.given_norms = norms.data();
    device::launch_load_rows(args, kAcc, nullptr);
    for (int64_t k = 0; k < rows * features; ++k) {
      const double size = static_cast<double>(taken[k]);
      EXPECT_NEAR(size, static_cast<double>(known[k]), sizeof(Out) == 2 ? 0.0 : rounding<T>(2, std::fabs(size)));
    }
  }
}

// A sum of rows in sets, each a part of the rows in order.
TEST(DeviceSumRows, InSets) {
  for (const int64_t sets : {1, 3, 16}) {
    const int64_t rows = 1100;
    const int64_t features = 37;
    const std::vector<double> x = random_values<double>(rows * features, 1);
    std::vector<double> sum(sets * features, 1.0);
    LoadRowsArgs args{};
    args.rows = {x.data(), c10::ScalarType::Double, features, 1};
    args.row_count = rows;
    args.features = features;
    args.sum = sum.data();
    args.sum_sets = sets;
    device::launch_load_rows(args, c10::ScalarType::Double, nullptr);
    for (int64_t k = 0; k < features; ++k) {
      for (int64_t set = 0; set < sets; ++set) {
        double expected = 1.0;
        double size = 1.0;
        for (int64_t i = set; i < rows; i += sets) {
          expected += x[i * features + k];
          size += std::fabs(x[i * features + k]);
        }
        EXPECT_NEAR(sum[set * features + k], expected, rounding(rows, size));
      }
    }
  }
}

// The loss and its slopes beside long double, for every reduction, with rows that are ignored (and hold NaN), far apart
// or without another class.
TEST(DeviceLoss, AgreesWithItsFormula) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (const int64_t rows : {0, 1, 7, 300, 20000}) {
    std::vector<double> other = random_values<double>(rows, 1), own = random_values<double>(rows, 2);
    const std::vector<double> mean = random_values<double>(rows, 3), grads = random_values<double>(rows + 1, 4);
    std::vector<int64_t> target(rows, 5);
    for (int64_t i = 0; i < rows; ++i) {
      other[i] *= i % 3 == 0 ? 60.0 : 1.0;
      if (i % 5 == 4) {
        target[i] = -100;
        other[i] = std::numeric_limits<double>::quiet_NaN();
      }
    }
    if (rows > 6) {
      other[6] = -kInfinity;
    }
    for (const double smoothing : {0.0, 0.1}) {
      for (const auto& [reduced, mean_of] : {std::pair{false, false}, {true, false}, {true, true}}) {
        for (const bool wide : {true, false}) {
          long double total = 0.0L;
          long double count = 0.0L;
          std::vector<long double> expected(rows);
          for (int64_t i = 0; i < rows; ++i) {
            if (target[i] == 5) {
              const long double gap = static_cast<long double>(other[i]) - own[i];
              expected[i] = gap == -kInfinity ? 0.0L : std::fmax(gap, 0.0L) + std::log1p(std::exp(-std::fabs(gap)));
              expected[i] += smoothing == 0.0 ? 0.0L : smoothing * (static_cast<long double>(own[i]) - mean[i]);
              count += 1.0L;
            }
            total += expected[i];
          }
          if (reduced) {
            expected = {mean_of ? total / count : total};
          }
          std::vector<double> wide_loss(std::max<int64_t>(rows, 1));
          std::vector<float> narrow_loss(std::max<int64_t>(rows, 1));
          LossArgs args{};
          args.rows = rows;
          args.other_lse = other.data();
          args.target_logit = own.data();
          args.mean_logit = smoothing == 0.0 ? nullptr : mean.data();
          args.target = target.data();
          args.label_smoothing = smoothing;
          args.ignore_index = -100;
          args.reduced = reduced;
          args.mean = mean_of;
          args.wide = wide;
          args.loss = wide ? static_cast<void*>(wide_loss.data()) : narrow_loss.data();
          device::launch_loss(args, nullptr);
          for (size_t i = 0; i < expected.size(); ++i) {
            const double got = wide ? wide_loss[i] : static_cast<double>(narrow_loss[i]);
            if (std::isnan(expected[i])) {
              EXPECT_TRUE(std::isnan(got));
              continue;
            }
            // A gap, an exponential and a logarithm of 2 units each, two sums; and those of all rows.
            const double size = 64.0 * (reduced && !mean_of ? static_cast<double>(rows) : 1.0);
            EXPECT_NEAR(
                got, static_cast<double>(expected[i]),
                rounding(10 + (reduced ? rows : 0), size) + (wide ? 0.0 : rounding<float>(1, std::fabs(got))));
          }
        }
        // One upstream gradient, or each its own; of float32 for one of them.
        const std::vector<float> narrow_grads(grads.begin(), grads.end());
        std::vector<double> to_other(rows, 7.0), to_own(rows, 7.0), to_mean(rows, 7.0);
        LossGradientArgs args{};
        args.rows = rows;
        args.grad = reduced ? RawMatrix{narrow_grads.data(), c10::ScalarType::Float, 0, 0}
                            : RawMatrix{grads.data(), c10::ScalarType::Double, 1, 0};
        args.other_lse = other.data();
        args.target_logit = own.data();
        args.target = target.data();
        args.label_smoothing = smoothing;
        args.ignore_index = -100;
        args.mean = mean_of;
        args.to_other = to_other.data();
        args.to_own = to_own.data();
        args.to_mean = to_mean.data();
        device::launch_loss_gradient(args, nullptr);
        const long double count = static_cast<long double>(std::count(target.begin(), target.end(), 5));
        for (int64_t i = 0; i < rows; ++i) {
          const bool counts = target[i] == 5;
          const long double g =
              (reduced ? static_cast<long double>(narrow_grads[0]) : grads[i]) / (mean_of ? count : 1);
          const long double p = 1.0L / (1.0L + std::exp(static_cast<long double>(own[i]) - other[i]));
          const double bound = rounding(8, std::fabs(static_cast<double>(g)));
          EXPECT_NEAR(to_other[i], counts ? static_cast<double>(g * p) : 0.0, bound);
          EXPECT_NEAR(to_own[i], counts ? static_cast<double>(g * (smoothing - p)) : 0.0, bound);
          EXPECT_NEAR(to_mean[i], counts ? static_cast<double>(-g * smoothing) : 0.0, bound);
        }
      }
    }
  }
}

// The sets of fused tiles, beside a sum in their order.
TEST(DeviceFoldSets, AddsAllSetsToTheRunningSums) {
  for (const auto& [rows, sets] : {std::pair<int64_t, int64_t>{1, 1}, {5, 7}, {33, 132}, {100, 9}}) {
    std::vector<double> sum = random_values<double>(sets * rows, 1);
    const std::vector<double> maximum = random_values<double>(sets * rows, 2);
    for (double& each : sum) {
      each = std::fabs(each);
    }
    sum[0] = std::numeric_limits<double>::quiet_NaN();
    for (const bool first : {true, false}) {
      std::vector<double> shift(rows, 1.5), total(rows, 2.0), largest(rows, 0.25);
      FoldSetsArgs args{};
      args.rows = rows;
      args.sets = sets;
      args.sum = sum.data();
      args.maximum = maximum.data();
      args.first = first;
      args.sums = {shift.data(), total.data(), largest.data()};
      device::launch_fold_sets(args, nullptr);
      for (int64_t i = 0; i < rows; ++i) {
        double expected = first ? 0.0 : 2.0 * std::exp(1.5);
        double most = first ? -std::numeric_limits<double>::infinity() : 0.25;
        for (int64_t set = 0; set < sets; ++set) {
          expected += sum[set * rows + i];
          most = std::fmax(most, maximum[set * rows + i]);
        }
        const double got = total[i] * std::exp(shift[i]);
        EXPECT_EQ(std::isnan(got), i == 0);
        if (i > 0) {
          EXPECT_NEAR(got, expected, rounding(sets + 4, expected));
        }
        EXPECT_EQ(largest[i], most);
      }
    }
  }
}

TYPED_TEST(DeviceKernels, AccumulateChunk) {
  TORCHMARGIN_TYPES
  for (const auto& [rows, features, classes] : kSizes) {
    for (const bool bounded : {false, true}) {
      KernelProblem<Scalar, T> p(rows, features, classes);
      if (!bounded && rows > 2) {
        p.products[2 * classes + classes / 2] = std::numeric_limits<T>::quiet_NaN();
      }
      const auto run = [&](auto accumulate) {
        std::vector<double> shift(rows, 1.0), sum(rows, 2.0), maximum(rows, -3.0);
        accumulate(AccumulateChunkArgs{
            p.tile(!bounded, !bounded), bounded, /*first=*/false, {shift.data(), sum.data(), maximum.data()}});
        for (int64_t i = 0; i < rows; ++i) { // shift and sum may differ, what they mean may not
          sum[i] = shift[i] + std::log(sum[i]);
        }
        return std::tuple(sum, maximum);
      };
      const auto got =
          run([&](const AccumulateChunkArgs& args) { device::launch_accumulate_chunk(args, kAcc, nullptr); });
      const auto expected = run([&](const AccumulateChunkArgs& args) { cpu::accumulate_range(args, kAcc, 0, rows); });
      const auto size = [&](int64_t i) { // of the largest of a row's logits, and of what stood there
        double largest = 3.0;
        for (int64_t j = 0; j < classes; ++j) {
          largest = std::fmax(largest, size_of_logit<T>(p.tile(!bounded, !bounded), i, j));
        }
        return largest;
      };
      expect_all_within(
          std::get<0>(got), std::get<0>(expected), [&](int64_t i) { return lse_rounding<T>(classes, size(i)); },
          "log-sum-exp");
      expect_all_within(
          std::get<1>(got), std::get<1>(expected), [&](int64_t i) { return rounding<T>(kLogitRoundings, size(i)); },
          "maximum");
    }
  }
}

// A +inf logit, then a logit that would move the shift so far that the old sum is times 0: +inf stays +inf.
TYPED_TEST(DeviceKernels, AnInfiniteLogitStaysInfinite) {
  TORCHMARGIN_TYPES
  const T infinity = std::numeric_limits<T>::infinity();
  for (const int64_t place : {1, 700, 3099}) {
    KernelProblem<Scalar, T> p(1, 3, 3100);
    std::fill(p.products.begin(), p.products.end(), T(1));
    std::fill(p.inverse_norms.begin(), p.inverse_norms.end(), T(1));
    for (int64_t j = 0; j < 3100; ++j) {
      p.products[j] = static_cast<T>(static_cast<double>(j) * 10); // a later one is the larger by thousands
    }
    p.products[place] = infinity;
    for (const bool on_device : {false, true}) {
      std::vector<double> shift(1, -INFINITY), sum(1), maximum(1, -INFINITY);
      const AccumulateChunkArgs args{
          p.tile(), /*bounded=*/false, /*first=*/false, {shift.data(), sum.data(), maximum.data()}};
      on_device ? device::launch_accumulate_chunk(args, kAcc, nullptr) : cpu::accumulate_range(args, kAcc, 0, 1);
      OnlineLse total;
      total.combine({1e6, 1.0}); // another chunk's, far above
      total.combine({shift[0], sum[0]});
      EXPECT_EQ(total.project(), INFINITY) << place << on_device;
      EXPECT_EQ(maximum[0], INFINITY);
    }
  }
}

// A row of -inf and +inf logits, and logits far below 0 only: the shift is the largest finite one.
TYPED_TEST(DeviceKernels, AccumulateExtremeLogits) {
  TORCHMARGIN_TYPES
  KernelProblem<Scalar, T> p(5, 3, 1100);
  const T infinity = std::numeric_limits<T>::infinity();
  std::fill(p.products.begin(), p.products.begin() + 1100, T(-60));
  std::fill(p.products.begin() + 1100, p.products.begin() + 1600, -infinity);
  std::fill(p.products.begin() + 2 * 1100, p.products.begin() + 3 * 1100, -infinity);
  p.products[3 * 1100 + 700] = infinity;
  std::vector<double> shift(5, -INFINITY), sum(5), maximum(5, -INFINITY);
  const ProductsTile tile = p.tile();
  device::launch_accumulate_chunk(
      {tile, /*bounded=*/false, /*first=*/false, {shift.data(), sum.data(), maximum.data()}}, kAcc, nullptr);
  double largest = -INFINITY;
  double expected = 0.0;
  double size = 0.0; // of the logits, as their softmax weighs them: so do their errors move the log-sum-exp
  const auto logit = [&](int64_t j) { return -60.0 * 16.0 * static_cast<double>(p.inverse_norms[j]); };
  for (int64_t j = 1; j < 1100; ++j) { // row 0's target is class 0
    largest = std::max(largest, logit(j));
  }
  for (int64_t j = 1; j < 1100; ++j) {
    expected += std::exp(logit(j) - largest);
    size += std::exp(logit(j) - largest) * std::fabs(logit(j));
  }
  size /= expected;
  EXPECT_NEAR(shift[0] + std::log(sum[0]), largest + std::log(expected), lse_rounding<T>(1100, size));
  EXPECT_NEAR(maximum[0], largest, rounding<T>(kLogitRoundings, std::fabs(largest)));
  EXPECT_TRUE(std::isfinite(shift[1] + std::log(sum[1])));
  EXPECT_EQ(shift[2] + std::log(sum[2]), -INFINITY);
  EXPECT_EQ(maximum[2], -INFINITY);
  EXPECT_EQ(shift[3] + std::log(sum[3]), INFINITY);
  EXPECT_EQ(maximum[3], INFINITY);
}

template <typename Out, typename Scalar, typename T>
void check_softmax_chunk(KernelProblem<Scalar, T>& p, bool with_bias) {
  p.other_lse[0] = 70.0; // everything of this row is below exp(-50)
  if (p.rows > 4) {
    p.products[4 * p.classes] = std::numeric_limits<T>::quiet_NaN(); // a row without an upstream gradient
  }
  const int64_t row_length = (p.classes + 15) / 8 * 8; // what lies behind a row must stay
  constexpr double scale = 0.5;
  const auto run = [&](auto zero, auto softmax) {
    using To = decltype(zero);
    std::vector<To> out(p.rows * row_length, To(7));
    softmax(SoftmaxChunkArgs{
        p.tile(with_bias, with_bias), p.other_lse.data(), p.upstream.data(), !with_bias, out.data(), row_length,
        dtype_of<To>, std::is_same_v<To, T> ? 1.0 : scale});
    return out;
  };
  const auto got =
      run(Out(), [&](const SoftmaxChunkArgs& args) { device::launch_softmax_chunk(args, dtype_of<T>, nullptr); });
  auto expected = run(T(), [&](const SoftmaxChunkArgs& args) { cpu::softmax_range(args, dtype_of<T>, 0, p.rows); });
  for (int64_t i = 0; i < p.rows && !std::is_same_v<Out, T>; ++i) {
    for (int64_t j = 0; j < p.classes; ++j) {
      expected[i * row_length + j] *= static_cast<T>(scale);
    }
  }
  const ProductsTile tile = p.tile(with_bias, with_bias);
  const auto bound = [&](int64_t k) {
    const int64_t i = k / row_length;
    const int64_t j = k % row_length;
    if (j >= p.classes || p.upstream[i] == 0.0) {
      return 0.0;
    }
    // One of them may be flushed where the other is not.
    const double flushed = std::exp(kFlush) * (with_bias ? 1.0 : static_cast<double>(p.inverse_norms[j]));
    return softmax_rounding<T>(size_of_logit<T>(tile, i, j), p.other_lse[i]) *
        std::fabs(static_cast<double>(expected[k])) +
        flushed;
  };
  expect_all_within(got, expected, bound, "softmax");
  EXPECT_EQ(got[0], Out(0));
}

TYPED_TEST(DeviceKernels, SoftmaxChunk) {
  TORCHMARGIN_TYPES
  for (const auto& [rows, features, classes] : kSizes) {
    for (const bool with_bias : {false, true}) {
      KernelProblem<Scalar, T> p(rows, features, classes);
      check_softmax_chunk<T>(p, with_bias);
      check_softmax_chunk<Narrow<Scalar>>(p, with_bias);
    }
  }
}

// Logits of 1000 and an lse that float32 would round by 2.9e-5: no softmax weight may have that error.
TYPED_TEST(DeviceKernels, SoftmaxTakesTheWholeLse) {
  TORCHMARGIN_TYPES
  KernelProblem<Scalar, T> p(1, 3, 40);
  std::fill(p.products.begin(), p.products.end(), T(62.5));
  std::fill(p.inverse_norms.begin(), p.inverse_norms.end(), T(1));
  p.other_lse[0] = 1000.0 + 2.9e-5;
  for (const bool on_device : {false, true}) {
    std::vector<T> out(40);
    const SoftmaxChunkArgs args{p.tile(), p.other_lse.data(), p.upstream.data(), true, out.data(), 40, kAcc, 1.0};
    on_device ? device::launch_softmax_chunk(args, kAcc, nullptr) : cpu::softmax_range(args, kAcc, 0, 1);
    // The logit and its difference to the upper part are exact; the exponential, the lower part and its difference are
    // not, nor is what is expected.
    const double q = std::exp(1000.0 - p.other_lse[0]);
    for (int64_t j = 1; j < 40; ++j) {
      ASSERT_NEAR(static_cast<double>(out[j]), q, (2 * kExpRoundings + 1) * kUnitRoundoff<T>);
    }
  }
}

TYPED_TEST(DeviceKernels, TargetRows) {
  TORCHMARGIN_TYPES
  constexpr int64_t kNumbers = sizeof(RowState) / sizeof(double);
  for (const auto& [rows, features, classes] : kSizes) {
    for (const bool normalize : {true, false}) {
      for (const bool measured : {false, true}) {
        const KernelProblem<Scalar, T> p(rows, features, classes);
        const auto run = [&](auto pass) {
          std::vector<RowState> state = measured ? p.states() : std::vector<RowState>(rows);
          std::vector<double> logit(rows);
          std::vector<T> angle(rows);
          pass(TargetRowsArgs{
              .context = p.context(normalize),
              .rows = rows,
              .measured = measured,
              .state = state.data(),
              .target_logit = logit.data(),
              .target_angle = angle.data()});
          const auto* const numbers = reinterpret_cast<const double*>(state.data());
          return std::tuple(std::vector<double>(numbers, numbers + kNumbers * rows), logit, angle);
        };
        const auto got = run([&](const TargetRowsArgs& args) { device::launch_target_rows(args, kAcc, nullptr); });
        const auto expected = run([&](const TargetRowsArgs& args) { cpu::target_rows_range(args, kAcc, 0, rows); });
        const auto& [state, logit, angle] = expected;
        const auto state_bound = [&](int64_t k) {
          return k % kNumbers < 2 ? rounding(features, state[k]) : distance_rounding(features);
        };
        const auto* const rows_of_state = reinterpret_cast<const RowState*>(state.data());
        const auto logit_bound = [&](int64_t i) {
          return target_logit_rounding(p.context(normalize), rows_of_state[i]);
        };
        expect_all_within(std::get<0>(got), state, state_bound, "state");
        expect_all_within(std::get<1>(got), logit, logit_bound, "target logit");
        expect_all_within(
            std::get<2>(got), angle, [&](int64_t) { return angle_rounding(features); }, "angle");
      }
    }
  }
}

TYPED_TEST(DeviceKernels, CombineRows) {
  TORCHMARGIN_TYPES
  for (const auto& [rows, features, classes] : kSizes) {
    for (const bool normalize : {true, false}) {
      const KernelProblem<Scalar, T> p(rows, features, classes);
      std::vector<double> shift(2 * rows, 1.0), sum(2 * rows, 3.0), maximum(2 * rows, 1.5);
      const std::vector<RowState> state = p.states();
      const double bias_sum = 0.25;
      const auto run = [&](auto pass) {
        std::vector<std::vector<double>> wide(2, std::vector<double>(rows));
        std::vector<T> largest(rows);
        pass(CombineRowsArgs{
            .context = p.context(normalize),
            .rows = rows,
            .state = state.data(),
            .target_logit = p.upstream.data(),
            .lanes = 2,
            .sums = {shift.data(), sum.data(), maximum.data()},
            .weight_sum = p.weight_sum.data(),
            .bias_sum = &bias_sum,
            .other_lse = wide[0].data(),
            .logit_sum = wide[1].data(),
            .max_other_logit = largest.data()});
        return std::pair(wide, largest);
      };
      const auto got = run([&](const CombineRowsArgs& args) { device::launch_combine_rows(args, kAcc, nullptr); });
      const auto expected = run([&](const CombineRowsArgs& args) { cpu::combine_rows_range(args, kAcc, 0, rows); });
      const auto sum_bound = [&](int64_t i) {
        return logit_sum_rounding<Scalar>(
            p.context(normalize), state[i], i, p.weight_sum.data(), bias_sum + std::fabs(p.upstream[i]));
      };
      expect_all_within(got.first[1], expected.first[1], sum_bound, "sum");
      EXPECT_EQ(got.first[0], expected.first[0]); // one member of a team does what one thread does
      EXPECT_EQ(got.second, expected.second);
    }
  }
}

TYPED_TEST(DeviceKernels, FinishClasses) {
  TORCHMARGIN_TYPES
  std::vector<std::array<int64_t, 3>> sizes(kSizes.begin(), kSizes.end());
  sizes.push_back({190, 1100, 4}); // more rows of a class, and more features, than a block holds at a time
  for (const auto& [rows, features, classes] : sizes) {
    for (const bool normalize : {true, false}) {
      for (const bool smoothing : {true, false}) {
        const KernelProblem<Scalar, T> p(rows, features, classes);
        const int64_t row_length = (features + 15) / 8 * 8;
        const std::vector<T> products = random_values<T>(classes * row_length, 6);
        const std::vector<RowState> state = p.states();
        const double products_scale = 0.25;
        const double total = std::accumulate(p.upstream.begin(), p.upstream.end(), 0.0);
        std::vector<double> bounds; // of the last run
        const auto run = [&](auto zero, const std::vector<T>& source, bool lack_norms, const RawMatrix& weight,
                             auto finish) {
          using Out = decltype(zero);
          std::vector<Out> gradient(classes * features);
          std::vector<T> bias = random_values<T>(classes, 7);
          const FinishClassesArgs args{
              .context = p.context(normalize),
              .state = state.data(),
              .upstream = p.upstreams(smoothing),
              .first_class = 0,
              .class_count = classes,
              .products = source.data(),
              .products_row_stride = row_length,
              .products_lack_norms = lack_norms,
              .grad_weight = gradient.data(),
              .weight = weight,
              .inverse_norms = normalize ? p.inverse_norms.data() : nullptr,
              .bias_products = bias.data(),
              .products_scale = &products_scale,
              .input_sum = smoothing ? p.weight_sum.data() : nullptr,
              .logit_sum_total = smoothing ? &total : nullptr,
              .sorted_target = p.sorted_target.data(),
              .sorted_row = p.order.data(),
              .rows = rows};
          bounds.clear();
          for (int64_t j = 0; j < classes; ++j) {
            const std::vector<double> of_class = grad_weight_rounding<Scalar, T>(args, j);
            bounds.insert(bounds.end(), of_class.begin(), of_class.end());
          }
          finish(args);
          return std::tuple(gradient, bias);
        };
        const auto on_device = [&](FinishClassesArgs args) {
          std::vector<T> own_products(rows * features);
          args.own_products = own_products.data();
          device::launch_finish_classes(args, kAcc, nullptr);
          args.products = own_products.data();
          args.products_row_stride = features;
          device::launch_finish_own_classes(args, kAcc, nullptr);
        };
        const auto on_cpu = [&](const FinishClassesArgs& args) { cpu::finish_classes_range(args, kAcc, 0, classes); };
        const RawMatrix given{p.weight.data(), dtype_of<Scalar>, features, 1};
        const RawMatrix wide{p.wide_weight.data(), kAcc, features, 1};
        const auto expected = run(T(), products, false, wide, on_cpu);
        const auto got = run(Scalar(), products, false, given, on_device);
        const auto bound = [&](int64_t k) { return bounds[k]; };
        expect_all_within(std::get<0>(got), std::get<0>(expected), bound, "grad_weight");
        EXPECT_EQ(std::get<1>(got), std::get<1>(expected)); // of one thread on both
        if (normalize) { // products without 1 / |w_j|, as unit vectors give them
          std::vector<T> lacking = products;
          std::vector<double> sizes(classes * features); // of the products, and of their part along w
          for (int64_t j = 0; j < classes; ++j) {
            const double inverse = static_cast<double>(p.inverse_norms[j]);
            const auto product = [&](int64_t k) {
              return std::fabs(static_cast<double>(products[j * row_length + k]));
            };
            const auto unit = [&](int64_t k) {
              return std::fabs(static_cast<double>(p.wide_weight[j * features + k])) * inverse;
            };
            double along = 0.0;
            for (int64_t k = 0; k < features; ++k) {
              lacking[j * row_length + k] /= p.inverse_norms[j];
              along += product(k) * unit(k);
            }
            for (int64_t k = 0; k < features; ++k) {
              sizes[j * features + k] = (product(k) + along * unit(k)) / products_scale;
            }
          }
          const auto completed = run(Scalar(), lacking, true, given, on_device);
          // The quotient is rounded to T, and so is the norm in it.
          const auto lacking_bound = [&](int64_t k) { return bounds[k] + rounding<T>(1, sizes[k]); };
          expect_all_within(std::get<0>(completed), std::get<0>(expected), lacking_bound, "grad_weight");
        }
      }
    }
  }
}

TYPED_TEST(DeviceKernels, FinishRows) {
  TORCHMARGIN_TYPES
  for (const auto& [rows, features, classes] : kSizes) {
    for (const bool normalize : {true, false}) {
      const KernelProblem<Scalar, T> p(rows, features, classes);
      const std::vector<RowState> state = p.states();
      std::vector<double> bounds;
      const auto run = [&](auto finish) {
        std::vector<T> gradient = random_values<T>(rows * features, 8);
        const double products_scale = 0.5;
        std::vector<double> grad_m2(rows), grad_m3(rows);
        const FinishRowsArgs args{
            .context = p.context(normalize),
            .state = state.data(),
            .upstream = p.upstreams(normalize),
            .rows = rows,
            .weight_sum = p.weight_sum.data(),
            .products = gradient.data(),
            .products_scale = &products_scale,
            .grad_m2 = grad_m2.data(),
            .grad_m3 = grad_m3.data()};
        bounds.clear();
        for (int64_t i = 0; i < rows; ++i) {
          const std::vector<double> of_row = grad_input_rounding<Scalar, T>(args, i);
          bounds.insert(bounds.end(), of_row.begin(), of_row.end());
        }
        finish(args);
        return std::tuple(gradient, grad_m2, grad_m3);
      };
      const auto got = run([&](const FinishRowsArgs& args) { device::launch_finish_rows(args, kAcc, nullptr); });
      const auto expected = run([&](const FinishRowsArgs& args) { cpu::finish_rows_range(args, kAcc, 0, rows); });
      expect_all_within(
          std::get<0>(got), std::get<0>(expected), [&](int64_t k) { return bounds[k]; }, "grad_input");
      EXPECT_EQ(std::get<1>(got), std::get<1>(expected)); // of one thread on both
      EXPECT_EQ(std::get<2>(got), std::get<2>(expected));
    }
  }
}

TYPED_TEST(DeviceKernels, Cosine) {
  TORCHMARGIN_TYPES
  for (const auto& [rows, features, classes] : kSizes) {
    const KernelProblem<Scalar, T> p(rows, features, classes);
    const std::vector<Scalar> cosine = random_values<Scalar>(rows * classes, 9, 0.3);
    const CosineContext context{
        {cosine.data(), dtype_of<Scalar>, classes, 1}, p.target.data(), classes, p.margin(), {}, {}, {}};
    const auto run = [&](auto forward, auto backward, auto transform) {
      std::vector<std::vector<double>> results(3, std::vector<double>(rows));
      forward(CosineForwardArgs{context, true, results[0].data(), results[1].data(), results[2].data()});
      std::vector<Scalar> grad(rows * classes), psi(rows * classes);
      std::vector<double> grad_m2(rows), grad_m3(rows);
      backward(CosineBackwardArgs{
          context, results[0].data(), p.upstream.data(), p.upstream.data(), p.upstream.data(), grad.data(),
          grad_m2.data(), grad_m3.data()});
      transform(TransformArgs{p.margin(), dtype_of<Scalar>, cosine.data(), nullptr, psi.data()});
      return std::tuple(results, grad, grad_m2, grad_m3, psi);
    };
    const auto got =
        run([&](const CosineForwardArgs& args) { device::launch_cosine_forward(args, rows, nullptr); },
            [&](const CosineBackwardArgs& args) { device::launch_cosine_backward(args, rows, nullptr); },
            [&](const TransformArgs& args) { device::launch_transform(args, rows * classes, nullptr); });
    const auto expected =
        run([&](const CosineForwardArgs& args) { cpu::cosine_forward(args, 0, rows); },
            [&](const CosineBackwardArgs& args) { cpu::cosine_backward(args, 0, rows); },
            [&](const TransformArgs& args) { cpu::transform(args, 0, rows * classes); });
    const auto& [results, grad, grad_m2, grad_m3, psi] = expected;
    // psi and the slopes to the margins are what one thread makes of one cosine on both.
    EXPECT_EQ(std::get<0>(got)[1], results[1]);
    EXPECT_EQ(std::get<2>(got), grad_m2);
    EXPECT_EQ(std::get<3>(got), grad_m3);
    EXPECT_EQ(std::get<4>(got), psi);
    const double scale = p.margin().scale;
    const auto size = [&](int64_t i, int64_t j) {
      return scale * std::fabs(static_cast<double>(cosine[i * classes + j]));
    };
    const auto row_size = [&](int64_t i, auto add) {
      double total = 0.0;
      for (int64_t j = 0; j < classes; ++j) {
        total = add(total, size(i, j));
      }
      return total;
    };
    const auto lse_bound = [&](int64_t i) {
      return lse_rounding<T>(classes, row_size(i, [](double a, double b) { return std::fmax(a, b); }));
    };
    // A sum for each class, the scale and the target's logit.
    const auto sum_bound = [&](int64_t i) {
      return rounding(classes + 2, row_size(i, std::plus<>()) + std::fabs(results[1][i]));
    };
    expect_all_within(std::get<0>(got)[0], results[0], lse_bound, "log-sum-exp");
    expect_all_within(std::get<0>(got)[2], results[2], sum_bound, "sum of logits");
    // factor Q + constant in T, or the target's slope in float64.
    const auto grad_bound = [&](int64_t k) {
      const int64_t i = k / classes;
      const double constant = scale * std::fabs(p.upstream[i]);
      const double q = std::exp(scale * static_cast<double>(cosine[k]) - results[0][i]);
      const double of_q = lse_bound(i) + softmax_rounding<T>(size(i, k % classes), results[0][i]);
      return k % classes == p.target[i]
          ? rounding<T>(1, std::fabs(static_cast<double>(grad[k])))
          : constant * (q * (of_q + rounding<T>(3, 1.0)) + rounding<T>(2, 1.0) + std::exp(kFlush));
    };
    expect_all_within(std::get<1>(got), grad, grad_bound, "grad_cosine");
  }
}

// ---- the inside of a tile (interior.cuh) beside the general way, on the same numbers --------------------------------

// Rows of float32 products that factors alone make logits; from 16 bytes on, or from one number past them, where
// everything goes the general way.
struct InteriorProblem {
  int64_t rows = 9;
  int64_t classes;
  bool aligned;
  bool with_factors;
  int64_t row_stride;
  std::vector<float> memory;
  std::vector<float> class_factors;
  std::vector<float> row_factors;
  std::vector<double> other_lse;
  std::vector<double> upstream;
  std::vector<int64_t> target;

  InteriorProblem(int64_t classes_, bool aligned_, bool with_factors_)
      : classes(classes_),
        aligned(aligned_),
        with_factors(with_factors_),
        row_stride((classes + 3) / 4 * 4),
        memory(rows * row_stride + 4),
        class_factors(classes + 4),
        row_factors{1.0F, 1.25F, 0.5F, 1.0F, 2.0F, 1.0F, 0.0F, 1.0F, 1.0F},
        other_lse(rows, 9.0 + 1e-7),
        upstream(rows, 1.0),
        target{0, classes - 1, classes / 2, -1, classes, classes / 3, 0, classes - 1, 2 % classes} {
    for (int64_t j = 0; j < classes; ++j) {
      class_factors[j] = 0.75F + 0.5F * static_cast<float>(j % 7) / 7.0F;
    }
    const std::vector<float> values = random_values<float>(rows * classes, 3, 0.1);
    for (int64_t i = 0; i < rows; ++i) {
      std::copy_n(values.begin() + i * classes, classes, products() + i * row_stride);
    }
    constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
    products()[5 * row_stride] = kNan; // and the row has no upstream gradient
    upstream[5] = 0.0;
    products()[7 * row_stride + classes / 2] = kNan; // a row that counts
    other_lse[2] = 70.0; // everything is below exp(-50)
    other_lse[4] = 20.0; // its logits are twice as large
    other_lse[8] = 9.0; // weights near 1
  }

  float* products() {
    return memory.data() + (aligned ? 0 : 1);
  }
  ProductsTile tile() {
    return {
        .products = products(),
        .row_stride = row_stride,
        .row_count = rows,
        .class_count = classes,
        .first_class = 0,
        .target = target.data(),
        .scale = 16.0,
        .row_factors = row_factors.data(),
        .class_factors = with_factors ? class_factors.data() : nullptr,
        .bias = nullptr};
  }
  double factor(int64_t j) const {
    return with_factors ? static_cast<double>(class_factors[j]) : 1.0;
  }
  double logit(int64_t i, int64_t j) {
    return 16.0 * row_factors[i] * products()[i * row_stride + j] * factor(j);
  }
};

constexpr int64_t kInteriorClasses[] = {1, 7, 8, 15, 16, 17, 100, 1025, 4096, 4099};

TEST(DeviceInterior, SumsAndMaxima) {
  for (const int64_t classes : kInteriorClasses) {
    for (const bool first : {true, false}) {
      const bool with_factors = classes % 2 == (first ? 0 : 1); // either way with either
      SCOPED_TRACE(classes);
      const auto run = [&](bool aligned) {
        InteriorProblem p(classes, aligned, with_factors);
        std::vector<double> shift(p.rows, 0.0), sum(p.rows, 3.0), maximum(p.rows, 1.5);
        device::launch_accumulate_chunk(
            {p.tile(), /*bounded=*/true, first, {shift.data(), sum.data(), maximum.data()}}, c10::kFloat, nullptr);
        for (int64_t i = 0; i < p.rows; ++i) {
          sum[i] *= std::exp(shift[i]);
        }
        return std::pair(sum, maximum);
      };
      const auto [inside, inside_maximum] = run(true);
      const auto [general, general_maximum] = run(false);
      InteriorProblem p(classes, true, with_factors);
      for (int64_t i = 0; i < p.rows; ++i) {
        double expected = first ? 0.0 : 3.0;
        double size = 0.0;
        for (int64_t j = 0; j < classes; ++j) {
          expected += j == p.target[i] ? 0.0 : std::exp(p.logit(i, j));
          size = std::max(size, std::fabs(p.logit(i, j)));
        }
        if (std::isnan(expected)) {
          EXPECT_TRUE(std::isnan(inside[i]) && std::isnan(general[i])) << i;
          continue;
        }
        // Each exponent: its scale's two roundings and the product's; the exponential; the sums of kGroup terms.
        const double relative = (3 * size + kExpRoundings + 17) * kUnitRoundoff<float>;
        EXPECT_NEAR(inside[i], expected, relative * expected) << i;
        EXPECT_NEAR(general[i], expected, relative * expected) << i;
        EXPECT_EQ(inside_maximum[i], general_maximum[i]) << i; // to the bit
      }
    }
  }
}

template <typename Out>
void check_weights_inside(bool with_factors) {
  constexpr double kScale = std::is_same_v<Out, c10::Half> ? 0x1p15 : 1.0;
  for (const int64_t classes : kInteriorClasses) {
    SCOPED_TRACE(classes);
    const auto run = [&](bool aligned) {
      InteriorProblem p(classes, aligned, with_factors);
      const int64_t row_length = (classes + 15) / 8 * 8; // what lies behind a row must stay
      std::vector<Out> out(p.rows * row_length, Out(7));
      device::launch_softmax_chunk(
          SoftmaxChunkArgs{
              p.tile(), p.other_lse.data(), p.upstream.data(), with_factors, out.data(), row_length, dtype_of<Out>,
              kScale},
          c10::kFloat, nullptr);
      return out;
    };
    const std::vector<Out> inside = run(true);
    const std::vector<Out> general = run(false);
    InteriorProblem p(classes, true, with_factors);
    const int64_t row_length = (classes + 15) / 8 * 8;
    constexpr double kStored = std::is_same_v<Out, c10::Half> ? 0x1p-11 : 0x1p-8;
    for (int64_t i = 0; i < p.rows; ++i) {
      for (int64_t j = 0; j < row_length; ++j) {
        const double got = static_cast<double>(inside[i * row_length + j]);
        const double other = static_cast<double>(general[i * row_length + j]);
        if (j >= classes) {
          ASSERT_EQ(got, 7.0);
        } else if (j == p.target[i] || p.upstream[i] == 0.0) {
          ASSERT_EQ(got, 0.0) << i << ", " << j;
        } else if (std::isnan(p.logit(i, j))) {
          ASSERT_TRUE(std::isnan(got) && std::isnan(other));
        } else {
          const double gap = p.logit(i, j) - p.other_lse[i];
          const double expected = kScale * std::exp(gap) * p.factor(j);
          const double rounded = (4 * std::fabs(p.logit(i, j)) + 2 + kExpRoundings) * kUnitRoundoff<float>;
          const double bound =
              (rounded + kStored) * expected + kScale * std::exp(kFlush) + (kScale > 1.0 ? 0x1p-25 : 0.0);
          ASSERT_NEAR(got, expected, bound) << i << ", " << j;
          ASSERT_NEAR(other, expected, bound) << i << ", " << j;
          if (gap < kFlush - 1e-4) {
            ASSERT_EQ(got, 0.0);
          }
        }
      }
    }
  }
}

TEST(DeviceInterior, SoftmaxWeights) {
  for (const bool with_factors : {false, true}) {
    check_weights_inside<c10::Half>(with_factors);
    check_weights_inside<c10::BFloat16>(with_factors);
  }
}

} // namespace
