// What turns products into gradients, one row (or class) at a time in float64, for one thread on a CPU and for a team
// of threads on a GPU. The formulas are those of docs/design.md.
#pragma once

#include "math/host_device.h"
#include "sweep/kernels.h"
#include "sweep/target_rows.h"

namespace torchmargin {

TORCHMARGIN_HOST_DEVICE inline double upstream_or_zero(const double* upstream, int64_t row) {
  return upstream != nullptr ? upstream[row] : 0.0;
}

// The gradients of a row's margins; an empty `row` where it has no upstream gradient.
TORCHMARGIN_HOST_DEVICE inline void finish_margins(const FinishRowsArgs& args, int64_t i, const TargetRow& row) {
  const double g_t = args.upstream.own[i];
  const double factor = g_t == 0.0 ? 0.0 : g_t * args.context.margin.scale * row.alpha * row.beta;
  if (args.grad_m2 != nullptr) {
    args.grad_m2[i] = factor == 0.0 ? 0.0 : factor * row.margin.dm2;
  }
  if (args.grad_m3 != nullptr) {
    args.grad_m3[i] = factor == 0.0 ? 0.0 : -factor * row.mu;
  }
}

// V of row i to grad_input, and the gradients of its margins.
template <typename Scalar, typename T, typename Team>
TORCHMARGIN_HOST_DEVICE void finish_row(const FinishRowsArgs& args, int64_t i, const Team& team) {
  const TargetContext& context = args.context;
  const int64_t features = context.features;
  T* const products = args.products != nullptr ? static_cast<T*>(args.products) + i * features : nullptr;
  const double g_o = args.upstream.others[i];
  const double g_t = args.upstream.own[i];
  const double g_z = upstream_or_zero(args.upstream.sum, i);
  const bool nothing = g_o == 0.0 && g_t == 0.0 && g_z == 0.0; // even if the row holds NaN
  TargetRow row{};
  if (!nothing) {
    row = evaluate_target(context, i, args.state[i]);
  }
  if (team.rank == 0) {
    finish_margins(args, i, row);
  }
  if (products == nullptr) {
    return;
  }
  if (nothing) {
    for (int64_t k = team.rank; k < features; k += team.size) {
      products[k] = T(0);
    }
    return;
  }
  const Reader<Scalar> x(context.input);
  const Reader<Scalar> w(context.weight);
  const double unscaled = g_o / *args.products_scale;
  const auto others = [&](int64_t k) {
    double value = g_o == 0.0 ? 0.0 : unscaled * static_cast<double>(products[k]);
    if (g_z != 0.0) {
      value += g_z * (args.weight_sum[k] - (row.present ? row.b * w(row.target, k) : 0.0));
    }
    return value;
  };
  double along = 0.0;
  if (context.normalize_input) {
    for (int64_t k = team.rank; k < features; k += team.size) {
      along += others(k) * row.inverse_x * x(i, k);
    }
    along = team.sum(along);
  }
  const double outer = context.margin.scale * (context.normalize_input ? row.inverse_x : 1.0);
  const double target_factor = row.present && g_t != 0.0 ? g_t * row.beta : 0.0;
  const double radial = context.normalize_input ? 0.0 : row.margin.psi;
  for (int64_t k = team.rank; k < features; k += team.size) {
    const double unit_x = row.inverse_x * x(i, k);
    double value = others(k) - along * unit_x;
    if (target_factor != 0.0) {
      const double tangent = row.angle.tangent(unit_x, row.inverse_w * w(row.target, k));
      value += target_factor * (radial * unit_x - row.margin.dtheta * tangent);
    }
    products[k] = static_cast<T>(outer * value);
  }
}

// The rows that have a class as their target, in rising order.
struct RowsOfClass {
  const int64_t* begin;
  const int64_t* end;
};

template <typename T>
TORCHMARGIN_HOST_DEVICE void finish_bias(const FinishClassesArgs& args, int64_t local, RowsOfClass rows) {
  T& bias = static_cast<T*>(args.bias_products)[local];
  double gradient = static_cast<double>(bias) / *args.products_scale;
  if (args.logit_sum_total != nullptr) {
    gradient += *args.logit_sum_total;
  }
  for (const int64_t* i = rows.begin; i != rows.end; ++i) {
    gradient += args.upstream.own[*i] - upstream_or_zero(args.upstream.sum, *i);
  }
  bias = static_cast<T>(gradient);
}

// What a row adds to the gradient of its own class.
struct OwnTerm {
  double upstream; // 0: nothing, whatever the row holds
  double factor;
  double radial;
  double dtheta;
  double inverse_x;
  Angle angle;
};

TORCHMARGIN_HOST_DEVICE inline OwnTerm own_term(const FinishClassesArgs& args, int64_t row) {
  const TargetContext& context = args.context;
  OwnTerm term{};
  term.upstream = args.upstream.own[row];
  if (term.upstream != 0.0) {
    const TargetRow target = evaluate_target(context, row, args.state[row]);
    term.factor = context.margin.scale * term.upstream * target.alpha * target.b;
    term.radial = context.normalize_weight ? 0.0 : target.margin.psi;
    term.dtheta = target.margin.dtheta;
    term.inverse_x = target.inverse_x;
    term.angle = target.angle;
  }
  return term;
}

// Row `place` of the products to the gradient of class `local` of the chunk. `scratch` holds `slice` features at a
// time; a member of the team touches only its own. for_own_terms(rows, body) calls body(row, its OwnTerm) for each, in
// order. Weight: the element of args.weight, Out: of grad_weight.
template <typename Scalar, typename T, typename Weight, typename Out, typename Team, typename ForOwnTerms>
TORCHMARGIN_HOST_DEVICE void finish_class(
    const FinishClassesArgs& args,
    int64_t place,
    int64_t local,
    RowsOfClass rows,
    double* scratch,
    int64_t slice,
    const Team& team,
    const ForOwnTerms& for_own_terms) {
  const TargetContext& context = args.context;
  const Reader<Scalar> x(context.input);
  const Reader<Weight> w(args.weight);
  const int64_t features = context.features;
  const T* const products = static_cast<const T*>(args.products) + place * args.products_row_stride;
  Out* const out = static_cast<Out*>(args.grad_weight) + local * features;

  const double inverse_w = inverse_norm(squared_norm(w, local, features, team));
  const double b = context.normalize_weight ? inverse_w : 1.0;
  const double unscale = (args.products_lack_norms ? b : 1.0) / *args.products_scale;
  const auto unit_w = [&](int64_t k) { return inverse_w * w(local, k); };

  // U_j of a slice into the scratch: products, and what smoothing adds without the class's own rows.
  const auto fill = [&](int64_t first, int64_t last) {
    for (int64_t k = first + team.rank; k < last; k += team.size) {
      const double smoothing = args.input_sum != nullptr ? context.margin.scale * b * args.input_sum[k] : 0.0;
      scratch[k - first] = static_cast<double>(products[k]) * unscale + smoothing;
    }
    for (const int64_t* i = rows.begin; i != rows.end; ++i) {
      const double g_z = upstream_or_zero(args.upstream.sum, *i);
      if (g_z == 0.0) {
        continue;
      }
      const double a = context.normalize_input ? inverse_norm(args.state[*i].x_squared) : 1.0;
      const double factor = context.margin.scale * b * g_z * a;
      for (int64_t k = first + team.rank; k < last; k += team.size) {
        scratch[k - first] -= factor * x(*i, k);
      }
    }
  };

  double along = 0.0;
  if (context.normalize_weight) {
    for (int64_t first = 0; first < features; first += slice) {
      const int64_t last = first + slice < features ? first + slice : features;
      fill(first, last);
      for (int64_t k = first + team.rank; k < last; k += team.size) {
        along += scratch[k - first] * unit_w(k);
      }
    }
    along = team.sum(along);
  }
  const bool filled = context.normalize_weight && features <= slice;
  for (int64_t first = 0; first < features; first += slice) {
    const int64_t last = first + slice < features ? first + slice : features;
    if (!filled) {
      fill(first, last);
    }
    for (int64_t k = first + team.rank; context.normalize_weight && k < last; k += team.size) {
      scratch[k - first] -= along * unit_w(k);
    }
    for_own_terms(rows, [&](int64_t row, const OwnTerm& own) {
      for (int64_t k = first + team.rank; own.upstream != 0.0 && k < last; k += team.size) {
        const double tangent = own.angle.tangent(unit_w(k), own.inverse_x * x(row, k));
        scratch[k - first] += own.factor * (own.radial * unit_w(k) - own.dtheta * tangent);
      }
    });
    for (int64_t k = first + team.rank; k < last; k += team.size) {
      out[k] = static_cast<Out>(scratch[k - first]);
    }
  }
}

} // namespace torchmargin
