// One row and its target in float64, before the sweep: the sums over D that make its state, and from the state its
// norms, angle, psi and slopes, which is little work and done again wherever they are needed. Host and device
// compilers read it; a team (math/team.h) shares one row.
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
    case c10::ScalarType::BFloat16:
      return static_cast<const c10::BFloat16*>(vector.data)[at];
    default:
      return std::nan(""); // no gate lets one through
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
TORCHMARGIN_HOST_DEVICE RowState measure_row(const TargetContext& context, int64_t row, const Team& team) {
  const Reader<Scalar> x(context.input);
  const Reader<Scalar> w(context.weight);
  const int64_t target = context.target[row];
  RowState state{};
  state.x_squared = squared_norm(x, row, context.features, team);
  if (target < 0 || target >= context.classes) {
    return state;
  }
  state.w_squared = squared_norm(w, target, context.features, team);
  const double inverse_x = inverse_norm(state.x_squared);
  const double inverse_w = inverse_norm(state.w_squared);
  if (inverse_x == 0.0 || inverse_w == 0.0) {
    return state;
  }
  double delta = 0.0;
  double sigma = 0.0;
  for (int64_t k = team.rank; k < context.features; k += team.size) {
    const double unit_x = inverse_x * x(row, k);
    const double unit_w = inverse_w * w(target, k);
    delta += (unit_x - unit_w) * (unit_x - unit_w);
    sigma += (unit_x + unit_w) * (unit_x + unit_w);
  }
  state.delta_squared = team.sum(delta);
  state.sigma_squared = team.sum(sigma);
  return state;
}

TORCHMARGIN_HOST_DEVICE inline TargetRow
evaluate_target(const TargetContext& context, int64_t row, const RowState& state) {
  TargetRow result{};
  result.target = context.target[row];
  result.present = result.target >= 0 && result.target < context.classes;
  result.inverse_x = inverse_norm(state.x_squared);
  result.a = context.normalize_input ? result.inverse_x : 1.0;
  result.alpha = context.normalize_input ? 1.0 : std::sqrt(state.x_squared);
  if (!result.present) {
    return result;
  }
  result.inverse_w = inverse_norm(state.w_squared);
  result.b = context.normalize_weight ? result.inverse_w : 1.0;
  result.beta = context.normalize_weight ? 1.0 : std::sqrt(state.w_squared);
  result.angle = result.inverse_x == 0.0 || result.inverse_w == 0.0
      ? right_angle()
      : angle_between(state.delta_squared, state.sigma_squared);
  const MarginParameters& margin = context.margin;
  result.mu = margin.margin_weight * vector_element(context.sample_margin_weight, row, 1.0);
  result.margin = apply_margin(
      margin, result.angle, margin.m2 + vector_element(context.sample_m2, row, 0.0),
      margin.m3 + vector_element(context.sample_m3, row, 0.0), result.mu);
  return result;
}

// The bias of a row's own class, 0 where there is none.
TORCHMARGIN_HOST_DEVICE inline double own_bias(const TargetContext& context, const TargetRow& row) {
  return row.present ? vector_element(context.bias, row.target, 0.0) : 0.0;
}

// The results of a row whose state is known.
template <typename T>
TORCHMARGIN_HOST_DEVICE void finish_target_row(const TargetRowsArgs& args, int64_t i, const RowState& state) {
  const TargetContext& context = args.context;
  args.state[i] = state;
  const TargetRow row = evaluate_target(context, i, state);
  args.target_logit[i] =
      row.present ? context.margin.scale * row.alpha * row.beta * row.margin.psi + own_bias(context, row) : 0.0;
  if (args.target_angle != nullptr) {
    static_cast<T*>(args.target_angle)[i] = static_cast<T>(row.present ? row.angle.theta : 0.0);
  }
}

template <typename Scalar, typename T, typename Team>
TORCHMARGIN_HOST_DEVICE void target_row(const TargetRowsArgs& args, int64_t i, const Team& team) {
  RowState state{};
  if (!args.measured) {
    state = measure_row<Scalar>(args.context, i, team);
  }
  if (team.rank == 0) { // NB: who reads a given state is who writes it
    finish_target_row<T>(args, i, args.measured ? args.state[i] : state);
  }
}

} // namespace torchmargin
