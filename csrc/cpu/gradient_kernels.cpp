// Products to gradients: every class and every row is finished by one thread.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/contiguous_rows.h"
#include "cpu/loops.h"
#include "cpu/range_kernels.h"
#include "cpu/row_kernels.h"
#include "math/team.h"
#include "sweep/finish_bodies.h"
#include "sweep/widen_upstream.h"

namespace torchmargin::cpu {
namespace {

// No row has this class as its target, and nothing is smoothed: the hot case.
template <typename T>
void finish_plain_class(const FinishClassesArgs& args, int64_t local) {
  const int64_t features = args.context.features;
  const T inverse = args.context.normalize_weight ? static_cast<const T*>(args.inverse_norms)[local] : T(0);
  row_kernels<T>().project_row(
      static_cast<const T*>(args.products) + local * args.products_row_stride,
      static_cast<const T*>(args.weight.data) + local * args.weight.row_stride,
      static_cast<T*>(args.grad_weight) + local * features, features, inverse,
      static_cast<T>(1.0 / *args.products_scale));
}

// What a row's target adds to the gradient of x, or of its own class.
TangentTerm tangent_of(const TargetRow& row, double inverse_self, double inverse_other, double factor, double radial) {
  return {
      .inverse_self = inverse_self,
      .inverse_other = inverse_other,
      .sign = row.angle.sign,
      .half = row.angle.half,
      .inverse_sine = row.angle.inverse_sine,
      .factor = factor,
      .radial = radial,
      .dtheta = row.margin.dtheta};
}

// finish_class() by the row kernels.
template <typename T>
void finish_contiguous_class(const FinishClassesArgs& args, int64_t local, RowsOfClass rows, double* scratch) {
  const RowKernels<T>& kernels = row_kernels<T>();
  const TargetContext& context = args.context;
  const int64_t features = context.features;
  const double scale = context.margin.scale;
  const T* const w = contiguous_row<T>(args.weight, local);
  const double inverse_w = inverse_norm(kernels.squared_norm(w, features));
  const double b = context.normalize_weight ? inverse_w : 1.0;
  kernels.widen_row(
      static_cast<const T*>(args.products) + local * args.products_row_stride, scratch, features,
      (args.products_lack_norms ? b : 1.0) / *args.products_scale);
  if (args.input_sum != nullptr) {
    for (int64_t k = 0; k < features; ++k) {
      scratch[k] += scale * b * args.input_sum[k];
    }
    for (const int64_t* i = rows.begin; i != rows.end; ++i) {
      const double g_z = upstream_or_zero(args.upstream.sum, *i);
      if (g_z != 0.0) {
        const double a = context.normalize_input ? inverse_norm(args.state[*i].x_squared) : 1.0;
        kernels.add_row(scratch, contiguous_row<T>(context.input, *i), features, -scale * b * g_z * a);
      }
    }
  }
  if (context.normalize_weight) {
    kernels.add_row(scratch, w, features, -kernels.dot(scratch, w, features) * inverse_w * inverse_w);
  }
  for (const int64_t* i = rows.begin; i != rows.end; ++i) {
    const double upstream = args.upstream.own[*i];
    if (upstream != 0.0) {
      const TargetRow row = evaluate_target(context, *i, args.state[*i]);
      const double radial = context.normalize_weight ? 0.0 : row.margin.psi;
      const TangentTerm term = tangent_of(row, inverse_w, row.inverse_x, scale * upstream * row.alpha * b, radial);
      kernels.add_tangent(scratch, w, contiguous_row<T>(context.input, *i), features, term);
    }
  }
  kernels.narrow_row(scratch, static_cast<T*>(args.grad_weight) + local * features, features);
}

// finish_row() by the row kernels. `scratch`: [D], where there is smoothing.
template <typename T>
void finish_contiguous_row(const FinishRowsArgs& args, int64_t i, double* scratch) {
  const TargetContext& context = args.context;
  T* const products = static_cast<T*>(args.products) + i * context.features;
  const double g_o = args.upstream.others[i];
  const double g_t = args.upstream.own[i];
  const double g_z = upstream_or_zero(args.upstream.sum, i);
  if (g_o == 0.0) { // nothing of the other classes, even if they hold NaN
    std::fill_n(products, context.features, T(0));
  }
  if (g_o == 0.0 && g_t == 0.0 && g_z == 0.0) { // nor of the row
    finish_margins(args, i, TargetRow{});
    return;
  }
  const TargetRow row = evaluate_target(context, i, args.state[i]);
  finish_margins(args, i, row);
  const double* others = args.weight_sum;
  if (g_z != 0.0 && row.present) {
    subtract_own_weight<T>(args.weight_sum, context.weight, row.target, row.b, context.features, scratch);
    others = scratch;
  }
  const RowGradient gradient{
      .outer = context.margin.scale * (context.normalize_input ? row.inverse_x : 1.0),
      .unscale = g_o / *args.products_scale,
      .smoothing = g_z,
      .sum = others,
      .project = context.normalize_input};
  const TangentTerm term = tangent_of(
      row, row.inverse_x, row.inverse_w, row.present && g_t != 0.0 ? g_t * row.beta : 0.0,
      context.normalize_input ? 0.0 : row.margin.psi);
  row_kernels<T>().finish_row(
      products, contiguous_row<T>(context.input, i),
      row.present ? contiguous_row<T>(context.weight, row.target) : nullptr, context.features, gradient, term);
}

} // namespace

void finish_classes_range(const FinishClassesArgs& args, c10::ScalarType acc, int64_t begin, int64_t end) {
  std::vector<double> scratch(args.products != nullptr ? args.context.features : 0);
  const int64_t* const targets = args.sorted_target;
  const int64_t* next = std::lower_bound(targets, targets + args.rows, args.first_class + begin);
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    with_dtype(args.context.input.dtype, [&](auto scalar) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t* const first = next;
        while (next != targets + args.rows && *next == args.first_class + j) {
          ++next;
        }
        const RowsOfClass rows{args.sorted_row + (first - targets), args.sorted_row + (next - targets)};
        if (args.bias_products != nullptr) {
          finish_bias<T>(args, j, rows);
        }
        if (args.products == nullptr) {
          continue;
        }
        if (rows.begin == rows.end && args.input_sum == nullptr) {
          finish_plain_class<T>(args, j);
        } else if (has_contiguous_rows<T>(args.context.input)) {
          finish_contiguous_class<T>(args, j, rows, scratch.data());
        } else {
          const auto for_own_terms = [&](RowsOfClass own, auto body) {
            for (const int64_t* i = own.begin; i != own.end; ++i) {
              body(*i, own_term(args, *i));
            }
          };
          finish_class<decltype(scalar), T, T, T>(
              args, j, j, rows, scratch.data(), args.context.features, Alone(), for_own_terms);
        }
      }
    });
  });
}

void finish_rows_range(const FinishRowsArgs& args, c10::ScalarType acc, int64_t begin, int64_t end) {
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    if (args.products != nullptr && has_contiguous_rows<T>(args.context)) {
      std::vector<double> scratch(args.weight_sum != nullptr ? args.context.features : 0);
      for (int64_t i = begin; i < end; ++i) {
        finish_contiguous_row<T>(args, i, scratch.data());
      }
      return;
    }
    with_dtype(args.context.input.dtype, [&](auto scalar) {
      for (int64_t i = begin; i < end; ++i) {
        finish_row<decltype(scalar), T>(args, i, Alone());
      }
    });
  });
}

void widen_upstream(const WidenUpstreamArgs& args) {
  double largest = 0.0;
  for (int64_t i = 0; i < args.rows; ++i) {
    largest = larger_size(largest, widen_row(args, i));
  }
  *args.operand_scale = operand_scale_of(args, largest);
}

} // namespace torchmargin::cpu
