// The CPU's two ways through the target pass, the end of the forward and the gradients: rows that are contiguous in acc
// go through the row kernels, any others through the bodies that all devices share. The same numbers on both, but for
// the order of sums.
#include <gtest/gtest.h>

#include <limits>
#include <vector>

#include "cpu/range_kernels.h"
#include "kernel_problem.h"
#include "rounding.h"

namespace {

using namespace torchmargin;
using namespace torchmargin::testing;

constexpr int64_t kRows = 13;
constexpr int64_t kClasses = 11;
constexpr int64_t kEmptyRow = 4; // has no upstream gradient
constexpr int64_t kOwnRow = 5; // has none for the other classes

// The matrix with `step` elements for each of its own, NaN between them.
template <typename Scalar>
std::vector<Scalar> spread(const std::vector<Scalar>& values, int64_t step) {
  std::vector<Scalar> out(values.size() * step, std::numeric_limits<Scalar>::quiet_NaN());
  for (size_t k = 0; k < values.size(); ++k) {
    out[k * step] = values[k];
  }
  return out;
}

// The numbers of a problem whose rows are in T and, with `step` elements for each, in Scalar.
template <typename Scalar, typename T>
struct Ways {
  int64_t features;
  int64_t step;
  KernelProblem<Scalar, T> p{kRows, features, kClasses};
  std::vector<Scalar> input, weight;
  std::vector<double> others = random_values<double>(kRows, 21), own = random_values<double>(kRows, 22),
                      sum = random_values<double>(kRows, 23);
  std::vector<RowState> states;
  bool normalize_input, normalize_weight, smoothing;

  Ways(int64_t features_, int64_t step_, bool normalize_input_, bool normalize_weight_, bool smoothing_)
      : features(features_),
        step(step_),
        normalize_input(normalize_input_),
        normalize_weight(normalize_weight_),
        smoothing(smoothing_) {
    const auto set = [&](int64_t row, auto value_at) {
      for (int64_t k = 0; k < features; ++k) {
        p.input[row * features + k] = static_cast<Scalar>(value_at(k));
        p.wide_input[row * features + k] = static_cast<T>(p.input[row * features + k]);
      }
    };
    const auto own_weight = [&](int64_t row, int64_t k) {
      return static_cast<double>(p.weight[p.target[row] * features + k]);
    };
    set(0, [&](int64_t k) { return own_weight(0, k); }); // at angle 0
    set(1, [&](int64_t k) { return -2 * own_weight(1, k); }); // at pi
    set(2, [&](int64_t) { return 0.0; });
    set(kEmptyRow, [&](int64_t) { return std::nan(""); });
    p.target[7] = kClasses + 3; // absent as well
    p.order.clear(); // in the order of the targets
    p.sorted_target.clear();
    for (int64_t target = -1; target <= kClasses + 3; ++target) {
      for (int64_t i = 0; i < kRows; ++i) {
        if (p.target[i] == target) {
          p.order.push_back(i);
          p.sorted_target.push_back(target);
        }
      }
    }
    others[kEmptyRow] = own[kEmptyRow] = sum[kEmptyRow] = 0.0;
    others[kOwnRow] = 0.0;
    own[3] = own[7] = own[8] = 0.0; // the absent targets', and another
    sum[9] = 0.0;
    input = spread(p.input, step);
    weight = spread(p.weight, step);
    states = measure(contiguous());
  }

  TargetContext contiguous() const {
    TargetContext context = p.context();
    context.input = {p.wide_input.data(), dtype_of<T>, features, 1};
    context.weight = {p.wide_weight.data(), dtype_of<T>, features, 1};
    context.normalize_input = normalize_input;
    context.normalize_weight = normalize_weight;
    return context;
  }
  TargetContext other() const {
    TargetContext context = contiguous();
    context.input = {input.data(), dtype_of<Scalar>, features * step, step};
    context.weight = {weight.data(), dtype_of<Scalar>, features * step, step};
    return context;
  }
  std::vector<RowState> measure(const TargetContext& context) const {
    std::vector<RowState> state(kRows);
    std::vector<double> logit(kRows);
    cpu::target_rows_range({context, kRows, false, state.data(), logit.data(), nullptr}, dtype_of<T>, 0, kRows);
    return state;
  }
  Upstream upstream() const {
    return {others.data(), own.data(), smoothing ? sum.data() : nullptr};
  }
  double x(int64_t row, int64_t k) const {
    return static_cast<double>(p.wide_input[row * features + k]);
  }
  double w(int64_t row, int64_t k) const {
    return static_cast<double>(p.wide_weight[row * features + k]);
  }
};

template <typename Scalar, typename T>
void compare_target_rows(const Ways<Scalar, T>& ways) {
  const auto run = [&](const TargetContext& context) {
    std::vector<RowState> state(kRows);
    std::vector<double> logit(kRows);
    std::vector<T> angle(kRows);
    cpu::target_rows_range({context, kRows, false, state.data(), logit.data(), angle.data()}, dtype_of<T>, 0, kRows);
    return std::tuple(state, logit, angle);
  };
  const auto [states, logits, angles] = run(ways.contiguous());
  const auto [expected_states, expected_logits, expected_angles] = run(ways.other());
  const int64_t features = ways.features;
  const double squared = distance_rounding(features);
  for (int64_t i = 0; i < kRows; ++i) {
    const RowState& state = states[i];
    const RowState& expected = expected_states[i];
    expect_within(state.x_squared, expected.x_squared, rounding(features, expected.x_squared), "x_squared");
    expect_within(state.w_squared, expected.w_squared, rounding(features, expected.w_squared), "w_squared");
    expect_within(state.delta_squared, expected.delta_squared, squared, "delta_squared");
    expect_within(state.sigma_squared, expected.sigma_squared, squared, "sigma_squared");
    expect_within(angles[i], expected_angles[i], angle_rounding(features), "angle");
    expect_within(logits[i], expected_logits[i], target_logit_rounding(ways.contiguous(), expected), "target_logit");
    const bool absent = i == 3 || i == 7;
    EXPECT_EQ(absent, logits[i] == 0.0 && state.w_squared == 0.0) << i;
  }
}

template <typename Scalar, typename T>
void compare_combine_rows(const Ways<Scalar, T>& ways) {
  const std::vector<double> shift(2 * kRows, 1.0), sum(2 * kRows, 3.0), maximum(2 * kRows, 1.5);
  const auto target_logit = random_values<double>(kRows, 24);
  const double bias_sum = 0.25;
  const auto run = [&](const TargetContext& context) {
    std::vector<double> other_lse(kRows), logit_sum(kRows);
    std::vector<T> largest(kRows);
    auto shifts = shift, sums = sum, maxima = maximum;
    const CombineRowsArgs args{
        .context = context,
        .rows = kRows,
        .state = ways.states.data(),
        .target_logit = target_logit.data(),
        .lanes = 2,
        .sums = {shifts.data(), sums.data(), maxima.data()},
        .weight_sum = ways.smoothing ? ways.p.weight_sum.data() : nullptr,
        .bias_sum = &bias_sum,
        .other_lse = other_lse.data(),
        .logit_sum = logit_sum.data(),
        .max_other_logit = largest.data()};
    cpu::combine_rows_range(args, dtype_of<T>, 0, kRows);
    return std::tuple(logit_sum, other_lse, largest);
  };
  const auto [sums, lse, largest] = run(ways.contiguous());
  const auto [expected_sums, expected_lse, expected_largest] = run(ways.other());
  EXPECT_EQ(lse, expected_lse);
  EXPECT_EQ(largest, expected_largest);
  for (int64_t i = 0; ways.smoothing && i < kRows; ++i) {
    const double bound = logit_sum_rounding<T>(
        ways.contiguous(), ways.states[i], i, ways.p.weight_sum.data(), bias_sum + std::fabs(target_logit[i]));
    expect_within(sums[i], expected_sums[i], bound, "logit_sum");
  }
  EXPECT_TRUE(ways.smoothing || sums == std::vector<double>(kRows));
}

template <typename Scalar, typename T>
void compare_finish_rows(const Ways<Scalar, T>& ways) {
  const int64_t features = ways.features;
  std::vector<T> products = random_values<T>(kRows * features, 25);
  for (const int64_t row : {kEmptyRow, kOwnRow}) { // of a class that holds it
    products[row * features + features / 2] = std::numeric_limits<T>::quiet_NaN();
  }
  const double products_scale = 0.5;
  const auto arguments = [&](const TargetContext& context, std::vector<T>& gradient) {
    return FinishRowsArgs{
        .context = context,
        .state = ways.states.data(),
        .upstream = ways.upstream(),
        .rows = kRows,
        .weight_sum = ways.smoothing ? ways.p.weight_sum.data() : nullptr,
        .products = gradient.data(),
        .products_scale = &products_scale,
        .grad_m2 = nullptr,
        .grad_m3 = nullptr};
  };
  const auto run = [&](const TargetContext& context) {
    std::vector<T> gradient = products;
    std::vector<double> grad_m2(kRows), grad_m3(kRows);
    FinishRowsArgs args = arguments(context, gradient);
    args.grad_m2 = grad_m2.data();
    args.grad_m3 = grad_m3.data();
    cpu::finish_rows_range(args, dtype_of<T>, 0, kRows);
    return std::tuple(gradient, grad_m2, grad_m3);
  };
  const auto [gradient, grad_m2, grad_m3] = run(ways.contiguous());
  const auto [expected, expected_m2, expected_m3] = run(ways.other());
  EXPECT_EQ(grad_m2, expected_m2);
  EXPECT_EQ(grad_m3, expected_m3);
  for (int64_t i = 0; i < kRows; ++i) {
    const auto bounds = grad_input_rounding<T, T>(arguments(ways.contiguous(), products), i);
    for (int64_t k = 0; k < features; ++k) {
      const T got = gradient[i * features + k];
      const T other_way = expected[i * features + k];
      if (i == kEmptyRow) {
        EXPECT_EQ(got, T(0));
        EXPECT_EQ(other_way, T(0));
        continue;
      }
      EXPECT_FALSE(std::isnan(other_way)) << i;
      expect_within(got, other_way, bounds[k], "grad_input");
    }
  }
}

template <typename Scalar, typename T>
void compare_finish_classes(const Ways<Scalar, T>& ways, bool lack_norms) {
  const int64_t features = ways.features;
  const std::vector<T> products = random_values<T>(kClasses * features, 26);
  const std::vector<double> input_sum = random_values<double>(features, 27);
  const double products_scale = 0.25;
  const double total = 0.7;
  const auto arguments = [&](const TargetContext& context, std::vector<T>& gradient, std::vector<T>& bias) {
    return FinishClassesArgs{
        .context = context,
        .state = ways.states.data(),
        .upstream = ways.upstream(),
        .first_class = 0,
        .class_count = kClasses,
        .products = products.data(),
        .products_row_stride = features,
        .products_lack_norms = lack_norms,
        .grad_weight = gradient.data(),
        .weight = {ways.p.wide_weight.data(), dtype_of<T>, features, 1},
        .inverse_norms = ways.normalize_weight ? ways.p.inverse_norms.data() : nullptr,
        .bias_products = bias.data(),
        .products_scale = &products_scale,
        .input_sum = ways.smoothing ? input_sum.data() : nullptr,
        .logit_sum_total = ways.smoothing ? &total : nullptr,
        .sorted_target = ways.p.sorted_target.data(),
        .sorted_row = ways.p.order.data(),
        .rows = kRows};
  };
  const auto run = [&](const TargetContext& context) {
    std::vector<T> gradient(kClasses * features);
    std::vector<T> bias = random_values<T>(kClasses, 28);
    cpu::finish_classes_range(arguments(context, gradient, bias), dtype_of<T>, 0, kClasses);
    return std::pair(gradient, bias);
  };
  auto [gradient, bias] = run(ways.contiguous());
  const auto [expected, expected_bias] = run(ways.other());
  EXPECT_EQ(bias, expected_bias);
  for (int64_t j = 0; j < kClasses; ++j) {
    const auto bounds = grad_weight_rounding<T, T>(arguments(ways.contiguous(), gradient, bias), j);
    for (int64_t k = 0; k < features; ++k) {
      EXPECT_FALSE(std::isnan(gradient[j * features + k])) << j;
      expect_within(gradient[j * features + k], expected[j * features + k], bounds[k], "grad_weight");
    }
  }
}

template <typename Scalar, typename T>
void compare(int64_t step) {
  for (const int64_t features : {1, 7, 64, 513}) {
    for (const bool normalize_input : {true, false}) {
      for (const bool normalize_weight : {true, false}) {
        for (const bool smoothing : {true, false}) {
          SCOPED_TRACE(::testing::Message() << features << normalize_input << normalize_weight << smoothing);
          const Ways<Scalar, T> ways(features, step, normalize_input, normalize_weight, smoothing);
          compare_target_rows(ways);
          compare_combine_rows(ways);
          compare_finish_rows(ways);
          compare_finish_classes(ways, /*lack_norms=*/false);
          compare_finish_classes(ways, /*lack_norms=*/true);
        }
      }
    }
  }
}

TEST(ContiguousRows, AgreeWithSpreadOnesInFloat64) {
  compare<double, double>(2);
}

TEST(ContiguousRows, AgreeWithSpreadOnesInFloat32) {
  compare<float, float>(2);
}

TEST(ContiguousRows, AgreeWithSixteenBits) {
  compare<c10::Half, float>(1);
}

} // namespace
