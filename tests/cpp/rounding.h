// What rounding may do to results: the tests' tolerances. n roundings of at most u each move a sum by at most n u times
// the sum of its terms' sizes, in whatever order it is added (Higham, Accuracy and Stability of Numerical Algorithms,
// section 3.1); first order and worst case.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/row_kernels.h"
#include "sweep/target_rows.h"

namespace torchmargin::testing {

template <typename T>
constexpr double kUnitRoundoff = std::is_same_v<T, double> ? 0x1p-53
    : std::is_same_v<T, float>                             ? 0x1p-24
    : std::is_same_v<T, c10::Half>                         ? 0x1p-11
                                                           : 0x1p-8;

// What `count` roundings to T on each of two ways do to a sum of terms of this size.
template <typename T = double>
double rounding(int64_t count, double size) {
  return static_cast<double>(2 * count) * kUnitRoundoff<T> * size;
}

// Half the distance of T's numbers there, at most; among subnormal ones half the smallest.
template <typename T>
double last_rounding(T value) {
  return kUnitRoundoff<T> * std::fabs(static_cast<double>(value)) +
      static_cast<double>(std::numeric_limits<T>::denorm_min()) / 2;
}

// Each is rounded to its type at last. NaN is near NaN, an infinity near itself, and what has no bound is the same.
template <typename Got, typename Expected>
bool expect_within(Got got, Expected expected, double bound, const char* what, size_t place = 0) {
  const double a = static_cast<double>(got);
  const double b = static_cast<double>(expected);
  const double most = bound + last_rounding(got) + last_rounding(expected);
  const bool within =
      std::isnan(b) ? std::isnan(a) : a == b || (std::isfinite(a) && std::isfinite(b) && std::fabs(a - b) <= most);
  EXPECT_TRUE(within) << what << " at " << place << ": " << a << " and " << b << " are further apart than " << most;
  return within;
}

// bound(k): of the k-th. Ends at the first that is not.
template <typename Got, typename Expected, typename Bound>
void expect_all_within(
    const std::vector<Got>& got,
    const std::vector<Expected>& expected,
    const Bound& bound,
    const char* what) {
  ASSERT_EQ(got.size(), expected.size());
  bool within = true;
  for (size_t k = 0; within && k < got.size(); ++k) {
    within = expect_within(got[k], expected[k], bound(static_cast<int64_t>(k)), what, k);
  }
}

// An inverse norm has half the error of its sum of squares, which has `features` roundings, and two more.
constexpr int64_t inverse_norm_roundings(int64_t features) {
  return features / 2 + 2;
}

// delta_squared and sigma_squared: a component of a unit vector has a rounding more, a difference another. They are as
// long as 4 = (|x| + |w|)^2 in all, and count twice in a square.
inline double distance_rounding(int64_t features) {
  return rounding(2 * (inverse_norm_roundings(features) + 2) + features, 4.0);
}

// A length's error is half of that of its square over its own size; the angle's is both lengths'.
inline double angle_rounding(int64_t features) {
  return rounding(2 * (2 * (inverse_norm_roundings(features) + 2) + features) + 8, 2.0);
}

// psi moves no faster than its angle (m1 = 1); lengths are factors.
inline double target_logit_rounding(const TargetContext& context, const RowState& state) {
  const double size = context.margin.scale * (context.normalize_input ? 1.0 : std::sqrt(state.x_squared)) *
      (context.normalize_weight ? 1.0 : std::sqrt(state.w_squared));
  return size * (angle_rounding(context.features) + rounding(context.features + 8, 1.0));
}

// logit_sum: B_y, difference, two factors, features - 1 sums, the scale and two sums.
template <typename Scalar>
double logit_sum_rounding(
    const TargetContext& context,
    const RowState& state,
    int64_t i,
    const double* weight_sum,
    double added) {
  const Reader<Scalar> x(context.input), w(context.weight);
  const TargetRow row = evaluate_target(context, i, state);
  double size = added;
  for (int64_t k = 0; k < context.features; ++k) {
    const double own = row.present ? row.b * w(row.target, k) : 0.0;
    size += context.margin.scale * std::fabs(row.a * x(i, k)) * (std::fabs(weight_sum[k]) + std::fabs(own));
  }
  return rounding(context.features + 6, size);
}

// The size of what a target adds to a component of the gradient of `self`, without its factor.
inline double tangent_size(const TargetRow& row, double self, double other, double radial) {
  const double tangent = (std::fabs(other) + (1 + row.angle.half) * std::fabs(self)) * row.angle.inverse_sine;
  return std::fabs(radial * self) + std::fabs(row.margin.dtheta) * tangent;
}
// A unit component, sum, difference, three factors, difference, sum, factor: what is rounded on a part's way.
constexpr int64_t kTangentRoundings = 11;

// Of the components of row i of grad_input. T: of the products, before they are overwritten.
template <typename Scalar, typename T>
std::vector<double> grad_input_rounding(const FinishRowsArgs& args, int64_t i) {
  const TargetContext& context = args.context;
  const Reader<Scalar> x(context.input), w(context.weight);
  const TargetRow row = evaluate_target(context, i, args.state[i]);
  const int64_t features = context.features;
  const T* const products = static_cast<const T*>(args.products) + i * features;
  const double g_o = args.upstream.others[i];
  const double g_z = args.upstream.sum != nullptr ? args.upstream.sum[i] : 0.0;
  std::vector<double> sizes(features);
  double along = 0.0;
  for (int64_t k = 0; k < features; ++k) {
    sizes[k] = g_o == 0.0 ? 0.0 : std::fabs(g_o / *args.products_scale * static_cast<double>(products[k]));
    if (g_z != 0.0) {
      const double own = row.present ? row.b * w(row.target, k) : 0.0;
      sizes[k] += std::fabs(g_z) * (std::fabs(args.weight_sum[k]) + std::fabs(own));
    }
    along += context.normalize_input ? sizes[k] * std::fabs(row.inverse_x * x(i, k)) : 0.0;
  }
  const double outer = context.margin.scale * (context.normalize_input ? row.inverse_x : 1.0);
  // The longest way is that of the part along x: four roundings of another's, two factors, features - 1 sums, two
  // factors, difference, sum and factor.
  const int64_t count = std::max(features + 10, kTangentRoundings);
  for (int64_t k = 0; k < features; ++k) {
    const double unit_x = row.inverse_x * x(i, k);
    double size = sizes[k] + along * std::fabs(unit_x);
    if (row.present) {
      const double radial = context.normalize_input ? 0.0 : row.margin.psi;
      size += std::fabs(args.upstream.own[i] * row.beta) *
          tangent_size(row, unit_x, row.inverse_w * w(row.target, k), radial);
    }
    sizes[k] = rounding(count, outer * size);
  }
  return sizes;
}

// Of the components of class j of grad_weight. T: of the products.
template <typename Scalar, typename T>
std::vector<double> grad_weight_rounding(const FinishClassesArgs& args, int64_t j) {
  const TargetContext& context = args.context;
  const Reader<Scalar> x(context.input), w(context.weight);
  const int64_t features = context.features;
  const double scale = context.margin.scale;
  const T* const products = static_cast<const T*>(args.products) + j * args.products_row_stride;
  double w_squared = 0.0;
  for (int64_t k = 0; k < features; ++k) {
    w_squared += w(j, k) * w(j, k);
  }
  const double inverse_w = inverse_norm(w_squared);
  const double b = context.normalize_weight ? inverse_w : 1.0;
  std::vector<double> others(features), own(features);
  bool plain = true;
  double along = 0.0;
  for (int64_t k = 0; k < features; ++k) {
    const double unscale = (args.products_lack_norms ? b : 1.0) / *args.products_scale;
    others[k] = std::fabs(unscale * static_cast<double>(products[k]));
    others[k] += args.input_sum != nullptr ? scale * b * std::fabs(args.input_sum[k]) : 0.0;
    for (int64_t i = 0; i < args.rows; ++i) {
      if (context.target[i] != j) {
        continue;
      }
      plain = false;
      const double g_z = args.upstream.sum != nullptr ? args.upstream.sum[i] : 0.0;
      const TargetRow row = evaluate_target(context, i, args.state[i]);
      others[k] += g_z == 0.0 ? 0.0 : scale * b * std::fabs(g_z * row.a * x(i, k));
      const double radial = context.normalize_weight ? 0.0 : row.margin.psi;
      own[k] += args.upstream.own[i] == 0.0 ? 0.0
                                            : scale * std::fabs(args.upstream.own[i]) * row.alpha * b *
              tangent_size(row, inverse_w * w(j, k), row.inverse_x * x(i, k), radial);
    }
    along += context.normalize_weight ? others[k] * std::fabs(inverse_w * w(j, k)) : 0.0;
  }
  // The longest way is that of the part along w: four factors and a sum for each row make another's; a product,
  // features - 1 sums, three factors, and a sum for each row again. The inverse norm is in it three times.
  const int64_t count = 3 * (inverse_norm_roundings(features) + 1) + features + 2 * args.rows + kTangentRoundings;
  std::vector<double> bounds(features);
  for (int64_t k = 0; k < features; ++k) {
    const double size = others[k] + along * std::fabs(inverse_w * w(j, k)) + own[k];
    // A class without rows is finished in T: a product, features - 1 sums, two factors of the inverse norm and one of
    // w, difference, and the last factor, that may have the inverse norm in it. What is smoothed has three more: the
    // norm, the term, its sum with the product (a CPU makes it in float64).
    bounds[k] = plain ? rounding<T>(features + (args.input_sum != nullptr ? 9 : 6), size) : rounding(count, size);
  }
  return bounds;
}

// A logit of products in T: three factors and a bias.
constexpr int64_t kLogitRoundings = 4;
// exp and log are within 2 units in the last place, 4 u.
constexpr int64_t kExpRoundings = 4;

// The log-sum-exp of `terms` logits of this size. A logit, and its difference to a shift of its size; its exponential,
// and those that move a shift, six at most. A block of at most kBlock terms is summed in T, in lanes of 16 bytes or
// more; what is left is float64.
template <typename T>
double lse_rounding(int64_t terms, double size) {
  constexpr int64_t lanes = 16 / sizeof(T);
  const int64_t sums = std::min(terms, cpu::kBlock) / lanes + 2 * lanes;
  return rounding<T>(kLogitRoundings + 2, size) + rounding<T>(7 * kExpRoundings + sums, 1.0) +
      rounding(terms / cpu::kBlock + 2 * kExpRoundings, 1.0 + size + std::log(static_cast<double>(terms)));
}

// exp(logit - lse), relative to itself: the logit's rounding, of its difference to the lse two, the exponential and
// two factors.
template <typename T>
double softmax_rounding(double logit_size, double lse) {
  return rounding<T>(kLogitRoundings, logit_size) + rounding<T>(2, logit_size + std::fabs(lse)) +
      rounding<T>(kExpRoundings + 2, 1.0);
}

} // namespace torchmargin::testing
