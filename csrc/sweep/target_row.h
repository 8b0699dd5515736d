// One row and its target in float64: norms, angle, psi, and what the gradients need of
// them. B x D work, so it is done again where it is needed and nothing is stored. Host and
// device compilers read it; a team (math/team.h) shares one row.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "math/angle.h"
#include "math/host_device.h"
#include "math/margin.h"
#include "sweep/kernels.h"

namespace torchmargin {

// Reads a caller's matrix element by element.
template <typename Scalar>
struct Reader {
  const Scalar* data;
  int64_t row_stride;
  int64_t column_stride;

  TORCHMARGIN_HOST_DEVICE explicit Reader(const RawMatrix& matrix)
      : data(static_cast<const Scalar*>(matrix.data)),
        row_stride(matrix.row_stride),
        column_stride(matrix.column_stride) {}

  TORCHMARGIN_HOST_DEVICE double operator()(int64_t row, int64_t column) const {
    return static_cast<double>(data[row * row_stride + column * column_stride]);
  }
};

// An element of a vector of any floating dtype; `otherwise` if there is no vector.
TORCHMARGIN_HOST_DEVICE inline double vector_element(const RawMatrix& vector, int64_t row, double otherwise) {
  if (vector.data == nullptr) {
    return otherwise;
  }
  const int64_t at = row * vector.row_stride;
  switch (vector.dtype) {
    case c10::ScalarType::Double:
      return static_cast<const double*>(vector.data)[at];
    case c10::ScalarType::Float:
      return static_cast<const float*>(vector.data)[at];
    case c10::ScalarType::Half:
      return static_cast<const c10::Half*>(vector.data)[at];
    default:
      return static_cast<const c10::BFloat16*>(vector.data)[at];
  }
}

struct TargetRow {
  int64_t target;
  bool present; // the target is one of this weight's classes
  double inverse_x; // 1 / |x_i|, 0 for a zero row
  double inverse_w; // 1 / |w_y|, 0 for a zero row
  double a; // A_i = a x_i
  double b; // B_y = b w_y
  double alpha; // 1 or |x_i|
  double beta; // 1 or |w_y|
  double mu;
  Angle angle;
  MarginValue margin;
};

template <typename Scalar, typename Team>
TORCHMARGIN_HOST_DEVICE double squared_norm(const Reader<Scalar>& matrix, int64_t row, int64_t size, const Team& team) {
  double sum = 0.0;
  for (int64_t k = team.rank; k < size; k += team.size) {
    const double value = matrix(row, k);
    sum += value * value;
  }
  return team.sum(sum);
}

template <typename Scalar, typename Team>
TORCHMARGIN_HOST_DEVICE TargetRow evaluate_target(const TargetContext& context, int64_t row, const Team& team) {
  const Reader<Scalar> x(context.input);
  const Reader<Scalar> w(context.weight);
  TargetRow result{};
  result.target = context.target[row];
  result.present = result.target >= 0 && result.target < context.classes;
  const double x_squared = squared_norm(x, row, context.features, team);
  result.inverse_x = inverse_norm(x_squared);
  result.a = context.normalize_input ? result.inverse_x : 1.0;
  result.alpha = context.normalize_input ? 1.0 : std::sqrt(x_squared);
  if (!result.present) {
    return result;
  }
  const double w_squared = squared_norm(w, result.target, context.features, team);
  result.inverse_w = inverse_norm(w_squared);
  result.b = context.normalize_weight ? result.inverse_w : 1.0;
  result.beta = context.normalize_weight ? 1.0 : std::sqrt(w_squared);
  if (result.inverse_x == 0.0 || result.inverse_w == 0.0) {
    result.angle = right_angle();
  } else {
    double delta = 0.0;
    double sigma = 0.0;
    for (int64_t k = team.rank; k < context.features; k += team.size) {
      const double unit_x = result.inverse_x * x(row, k);
      const double unit_w = result.inverse_w * w(result.target, k);
      delta += (unit_x - unit_w) * (unit_x - unit_w);
      sigma += (unit_x + unit_w) * (unit_x + unit_w);
    }
    delta = team.sum(delta);
    sigma = team.sum(sigma);
    result.angle = angle_between(delta, sigma);
  }
  const MarginParameters& margin = context.margin;
  result.mu = margin.margin_weight * vector_element(context.sample_margin_weight, row, 1.0);
  result.margin = apply_margin(
      margin, result.angle, margin.m2 + vector_element(context.sample_m2, row, 0.0),
      margin.m3 + vector_element(context.sample_m3, row, 0.0), result.mu);
  return result;
}

} // namespace torchmargin
