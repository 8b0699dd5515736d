// One row and its target in float64, before the sweep: the sums over D that make its state (with sub-centers those of
// the nearest), and from the state its norms, angle, psi and slopes, which is little work and done again wherever they
// are needed. Host and device compilers read it; a team (math/team.h) shares one row.
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

// An element of a matrix of any floating dtype.
TORCHMARGIN_HOST_DEVICE inline double matrix_element(const RawMatrix& matrix, int64_t row, int64_t column) {
  const int64_t at = row * matrix.row_stride + column * matrix.column_stride;
  switch (matrix.dtype) {
    case c10::ScalarType::Double:
      return static_cast<const double*>(matrix.data)[at];
    case c10::ScalarType::Float:
      return static_cast<const float*>(matrix.data)[at];
    case c10::ScalarType::Half:
      return static_cast<const c10::Half*>(matrix.data)[at];
    case c10::ScalarType::BFloat16:
      return static_cast<const c10::BFloat16*>(matrix.data)[at];
    default:
      return std::nan(""); // no gate lets one through
  }
}

// An element of a vector; `otherwise` if there is no vector.
TORCHMARGIN_HOST_DEVICE inline double vector_element(const RawMatrix& vector, int64_t row, double otherwise) {
  return vector.data == nullptr ? otherwise : matrix_element(vector, row, 0);
}

struct TargetRow {
  int64_t own_class;
  int64_t target; // the row of the weight that stands for it: the nearest center
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

// A row of a state with |x|^2 alone, against row `center` of the weight.
template <typename Scalar, typename Team>
TORCHMARGIN_HOST_DEVICE RowState
measure_against(const TargetContext& context, int64_t row, RowState state, int64_t center, const Team& team) {
  const Reader<Scalar> x(context.input);
  const Reader<Scalar> w(context.weight);
  state.w_squared = squared_norm(w, center, context.features, team);
  const double inverse_x = inverse_norm(state.x_squared);
  const double inverse_w = inverse_norm(state.w_squared);
  if (inverse_x == 0.0 || inverse_w == 0.0) {
    return state;
  }
  double delta = 0.0;
  double sigma = 0.0;
  for (int64_t k = team.rank; k < context.features; k += team.size) {
    const double unit_x = inverse_x * x(row, k);
    const double unit_w = inverse_w * w(center, k);
    delta += (unit_x - unit_w) * (unit_x - unit_w);
    sigma += (unit_x + unit_w) * (unit_x + unit_w);
  }
  state.delta_squared = team.sum(delta);
  state.sigma_squared = team.sum(sigma);
  return state;
}

// The angle between a row and the weight that its state was measured against.
TORCHMARGIN_HOST_DEVICE inline Angle angle_of(const RowState& state) {
  return inverse_norm(state.x_squared) == 0.0 || inverse_norm(state.w_squared) == 0.0
      ? right_angle()
      : angle_between(state.delta_squared, state.sigma_squared);
}

// The state of a row against the nearest of a class's centers. measure(center): against that row of the weight. NB: of
// equal ones the first, and the first NaN: as the largest of cosines, see FoldCentersArgs.
template <typename Measure>
TORCHMARGIN_HOST_DEVICE RowState nearest_center(const TargetContext& context, int64_t class_index, Measure measure) {
  const int64_t first = class_index * context.centers;
  RowState nearest = measure(first);
  if (context.centers == 1) {
    return nearest;
  }
  double theta = angle_of(nearest).theta;
  for (int64_t k = 1; k < context.centers; ++k) {
    RowState state = measure(first + k);
    const double other = angle_of(state).theta;
    if (other < theta || (std::isnan(other) && !std::isnan(theta))) {
      state.center = static_cast<double>(k);
      nearest = state;
      theta = other;
    }
  }
  return nearest;
}

template <typename Scalar, typename Team>
TORCHMARGIN_HOST_DEVICE RowState measure_row(const TargetContext& context, int64_t row, const Team& team) {
  const int64_t target = context.target[row];
  RowState state{};
  state.x_squared = squared_norm(Reader<Scalar>(context.input), row, context.features, team);
  if (target < 0 || target >= context.classes) {
    return state;
  }
  return nearest_center(
      context, target, [&](int64_t center) { return measure_against<Scalar>(context, row, state, center, team); });
}

// psi and its slopes to what one against all has for a row's own class.
TORCHMARGIN_HOST_DEVICE inline void through_curve(const BinaryForm& form, MarginValue& margin) {
  const Curve curve = curve_of(form.power, margin.psi);
  margin.psi = form.kind == BinaryKind::cosine ? curve.value - form.margin : curve.value;
  margin.dtheta *= curve.slope;
}

TORCHMARGIN_HOST_DEVICE inline TargetRow
evaluate_target(const TargetContext& context, int64_t row, const RowState& state) {
  TargetRow result{};
  result.own_class = context.target[row];
  result.present = result.own_class >= 0 && result.own_class < context.classes;
  result.inverse_x = inverse_norm(state.x_squared);
  result.a = context.normalize_input ? result.inverse_x : 1.0;
  result.alpha = context.normalize_input ? 1.0 : std::sqrt(state.x_squared);
  if (!result.present) {
    return result;
  }
  result.target = result.own_class * context.centers + static_cast<int64_t>(state.center);
  result.inverse_w = inverse_norm(state.w_squared);
  result.b = context.normalize_weight ? result.inverse_w : 1.0;
  result.beta = context.normalize_weight ? 1.0 : std::sqrt(state.w_squared);
  result.angle = angle_of(state);
  const MarginParameters& margin = context.margin;
  result.mu = margin.margin_weight * vector_element(context.sample_margin_weight, row, 1.0);
  result.margin = apply_margin(
      margin, result.angle, margin.m2 + vector_element(context.sample_m2, row, 0.0),
      margin.m3 + vector_element(context.sample_m3, row, 0.0), result.mu);
  if (context.binary.kind != BinaryKind::none) {
    through_curve(context.binary, result.margin);
  }
  return result;
}

// The bias of a row's own class, 0 where there is none.
TORCHMARGIN_HOST_DEVICE inline double own_bias(const TargetContext& context, const TargetRow& row) {
  return row.present ? vector_element(context.bias, row.own_class, 0.0) : 0.0;
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
