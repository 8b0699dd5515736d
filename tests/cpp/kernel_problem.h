// A small problem for kernels called by themselves: everything that they read, as raw memory.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "math/team.h"
#include "sweep/cosine_kernels.h"
#include "sweep/target_rows.h"

namespace torchmargin::testing {

template <typename T>
constexpr c10::ScalarType dtype_of = c10::ScalarType::Undefined;
template <>
constexpr c10::ScalarType dtype_of<double> = c10::ScalarType::Double;
template <>
constexpr c10::ScalarType dtype_of<float> = c10::ScalarType::Float;
template <>
constexpr c10::ScalarType dtype_of<c10::Half> = c10::ScalarType::Half;
template <>
constexpr c10::ScalarType dtype_of<c10::BFloat16> = c10::ScalarType::BFloat16;

template <typename T>
std::vector<T> random_values(int64_t size, unsigned seed, double deviation = 1.0) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0.0, deviation);
  std::vector<T> values(size);
  std::generate(values.begin(), values.end(), [&] { return static_cast<T>(normal(generator)); });
  return values;
}

// Scalar: what the caller gave; T: acc.
template <typename Scalar, typename T>
struct KernelProblem {
  int64_t rows, features, classes;
  std::vector<Scalar> input = random_values<Scalar>(rows * features, 1);
  std::vector<Scalar> weight = random_values<Scalar>(classes * features, 2);
  std::vector<T> wide_input = std::vector<T>(input.begin(), input.end());
  std::vector<T> wide_weight = std::vector<T>(weight.begin(), weight.end());
  std::vector<T> products = random_values<T>(rows * classes, 3, 0.1);
  std::vector<T> inverse_norms = std::vector<T>(classes);
  std::vector<T> row_factors = std::vector<T>(rows, T(1.25));
  std::vector<T> bias = random_values<T>(classes, 10);
  std::vector<double> other_lse = std::vector<double>(rows, 9.0 + 1e-7); // not a number of float32
  std::vector<double> upstream = random_values<double>(rows, 4);
  std::vector<double> weight_sum = random_values<double>(features, 5);
  std::vector<int64_t> target = std::vector<int64_t>(rows);
  std::vector<int64_t> order = std::vector<int64_t>(rows);
  std::vector<int64_t> sorted_target;

  KernelProblem(int64_t rows_, int64_t features_, int64_t classes_)
      : rows(rows_), features(features_), classes(classes_) {
    for (int64_t i = 0; i < rows; ++i) {
      target[i] = i == 3 ? -1 : (i * 7) % classes / 2; // some classes have several rows, one row has none
    }
    if (rows > 4) {
      upstream[4] = 0.0;
    }
    for (int64_t j = 0; j < classes; ++j) {
      const T* const w = wide_weight.data() + j * features;
      inverse_norms[j] = static_cast<T>(1.0 / std::sqrt(std::inner_product(w, w + features, w, 0.0)));
    }
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return target[a] < target[b]; });
    for (const int64_t row : order) {
      sorted_target.push_back(target[row]);
    }
  }

  MarginParameters margin() const {
    MarginParameters margin;
    margin.scale = 16.0;
    margin.m2 = 0.4;
    return margin;
  }
  TargetContext context(bool normalize = true) const {
    return {
        .input = {input.data(), dtype_of<Scalar>, features, 1},
        .weight = {weight.data(), dtype_of<Scalar>, features, 1},
        .target = target.data(),
        .features = features,
        .classes = classes,
        .margin = margin(),
        .normalize_input = normalize,
        .normalize_weight = normalize};
  }
  ProductsTile tile(bool with_bias = false, bool with_row_factors = false) const {
    return {
        .products = products.data(),
        .row_stride = classes,
        .row_count = rows,
        .class_count = classes,
        .first_class = 0,
        .target = target.data(),
        .scale = 16.0,
        .row_factors = with_row_factors ? row_factors.data() : nullptr,
        .class_factors = inverse_norms.data(),
        .bias = with_bias ? bias.data() : nullptr};
  }
  // Of every row.
  std::vector<RowState> states() const {
    std::vector<RowState> states;
    for (int64_t i = 0; i < rows; ++i) {
      states.push_back(measure_row<Scalar>(context(), i, Alone()));
    }
    return states;
  }
  Upstream upstreams(bool smoothing) const {
    return {upstream.data(), upstream.data(), smoothing ? upstream.data() : nullptr};
  }
};

} // namespace torchmargin::testing
