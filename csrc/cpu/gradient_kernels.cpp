// Projection of the gradients where vectors were normalised, and the targets' own terms, in
// float64. Every class and every row is finished by one thread.
#include "cpu/gradient_kernels.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu/loops.h"
#include "cpu/row_kernels.h"
#include "cpu/target_row.h"

namespace torchmargin::cpu {
namespace {

double upstream_or_zero(const double* upstream, int64_t row) {
  return upstream != nullptr ? upstream[row] : 0.0;
}

// What the rows whose target is class j add to its gradient, in float64.
template <typename Scalar, typename T>
class ClassFinisher {
 public:
  explicit ClassFinisher(const FinishClassesArgs& args)
      : args_(args),
        context_(args.context),
        x_(args.context.input),
        features_(args.context.features),
        unscale_(1.0 / *args.operand_scale),
        gradient_(features_),
        unit_w_(features_) {}

  void finish(int64_t local, const int64_t* rows_begin, const int64_t* rows_end) {
    if (args_.bias_products != nullptr) {
      finish_bias(static_cast<T*>(args_.bias_products)[local], rows_begin, rows_end);
    }
    if (args_.products == nullptr) {
      return;
    }
    const T* const row = static_cast<const T*>(args_.products) + local * features_;
    T* const out = static_cast<T*>(args_.grad_weight) + local * features_;
    const T* const w = static_cast<const T*>(args_.weight) + local * args_.weight_row_stride;
    if (rows_begin == rows_end && args_.input_sum == nullptr) {
      finish_plain(row, w, out, local);
      return;
    }
    const double inverse_w = inverse_norm(squared_norm(w));
    const double b = context_.normalize_weight ? inverse_w : 1.0;
    for (int64_t k = 0; k < features_; ++k) {
      unit_w_[k] = inverse_w * static_cast<double>(w[k]);
      gradient_[k] = static_cast<double>(row[k]) * unscale_;
      if (args_.input_sum != nullptr) {
        gradient_[k] += context_.margin.scale * b * args_.input_sum[k];
      }
    }
    for (const int64_t* i = rows_begin; i != rows_end; ++i) {
      take_own_input(*i, b);
    }
    if (context_.normalize_weight) {
      double along = 0.0;
      for (int64_t k = 0; k < features_; ++k) {
        along += gradient_[k] * unit_w_[k];
      }
      for (int64_t k = 0; k < features_; ++k) {
        gradient_[k] -= along * unit_w_[k];
      }
    }
    for (const int64_t* i = rows_begin; i != rows_end; ++i) {
      add_target_term(*i, b);
    }
    for (int64_t k = 0; k < features_; ++k) {
      out[k] = static_cast<T>(gradient_[k]);
    }
  }

 private:
  void finish_bias(T& bias, const int64_t* rows_begin, const int64_t* rows_end) {
    double gradient = static_cast<double>(bias) * unscale_;
    if (args_.logit_sum_total != nullptr) {
      gradient += *args_.logit_sum_total;
    }
    for (const int64_t* i = rows_begin; i != rows_end; ++i) {
      gradient += args_.upstream.target_logit[*i] - upstream_or_zero(args_.upstream.logit_sum, *i);
    }
    bias = static_cast<T>(gradient);
  }

  // No row has this class as its target, and nothing is smoothed.
  void finish_plain(const T* row, const T* w, T* out, int64_t local) {
    const T inverse = context_.normalize_weight ? static_cast<const T*>(args_.inverse_norms)[local] : T(0);
    row_kernels<T>().project_row(row, w, out, features_, inverse, static_cast<T>(unscale_));
  }

  double squared_norm(const T* w) const {
    return row_kernels<T>().squared_norm(w, features_);
  }

  // The sum R over all rows counts row i too, which has no "other" logit here.
  void take_own_input(int64_t i, double b) {
    const double g_z = upstream_or_zero(args_.upstream.logit_sum, i);
    if (g_z == 0.0) {
      return;
    }
    const TargetRow target = evaluate_target<Scalar>(context_, i);
    const double factor = context_.margin.scale * b * g_z * target.a;
    for (int64_t k = 0; k < features_; ++k) {
      gradient_[k] -= factor * x_(i, k);
    }
  }

  void add_target_term(int64_t i, double b) {
    const double upstream = args_.upstream.target_logit[i];
    if (upstream == 0.0) {
      return;
    }
    const TargetRow target = evaluate_target<Scalar>(context_, i);
    const double factor = context_.margin.scale * upstream * target.alpha * b;
    const double radial = context_.normalize_weight ? 0.0 : target.margin.psi;
    for (int64_t k = 0; k < features_; ++k) {
      const double tangent = target.angle.tangent(unit_w_[k], target.inverse_x * x_(i, k));
      gradient_[k] += factor * (radial * unit_w_[k] - target.margin.dtheta * tangent);
    }
  }

  const FinishClassesArgs& args_;
  const TargetContext& context_;
  Reader<Scalar> x_;
  int64_t features_;
  double unscale_;
  std::vector<double> gradient_; // [D]
  std::vector<double> unit_w_; // [D]
};

template <typename Scalar, typename T>
void finish_row(const FinishRowsArgs& args, int64_t i, std::vector<double>& gradient) {
  const TargetContext& context = args.context;
  const int64_t features = context.features;
  T* const products = args.products != nullptr ? static_cast<T*>(args.products) + i * features : nullptr;
  const double g_o = args.upstream.other_lse[i];
  const double g_t = args.upstream.target_logit[i];
  const double g_z = upstream_or_zero(args.upstream.logit_sum, i);
  if (g_o == 0.0 && g_t == 0.0 && g_z == 0.0) { // nothing, even if the row holds NaN
    if (products != nullptr) {
      std::fill(products, products + features, T(0));
    }
    if (args.grad_m2 != nullptr) {
      args.grad_m2[i] = 0.0;
    }
    if (args.grad_m3 != nullptr) {
      args.grad_m3[i] = 0.0;
    }
    return;
  }
  const TargetRow row = evaluate_target<Scalar>(context, i);
  const double margin_factor = g_t == 0.0 ? 0.0 : g_t * context.margin.scale * row.alpha * row.beta;
  if (args.grad_m2 != nullptr) {
    args.grad_m2[i] = margin_factor == 0.0 ? 0.0 : margin_factor * row.margin.dm2;
  }
  if (args.grad_m3 != nullptr) {
    args.grad_m3[i] = margin_factor == 0.0 ? 0.0 : -margin_factor * row.mu;
  }
  if (products == nullptr) {
    return;
  }
  const Reader<Scalar> x(context.input);
  const Reader<Scalar> w(context.weight);
  double along = 0.0;
  for (int64_t k = 0; k < features; ++k) {
    double value = g_o == 0.0 ? 0.0 : g_o * static_cast<double>(products[k]);
    if (g_z != 0.0) {
      value += g_z * (args.weight_sum[k] - (row.present ? row.b * w(row.target, k) : 0.0));
    }
    gradient[k] = value;
    along += value * row.inverse_x * x(i, k);
  }
  if (!context.normalize_input) {
    along = 0.0;
  }
  const double outer = context.margin.scale * (context.normalize_input ? row.inverse_x : 1.0);
  const double target_factor = row.present && g_t != 0.0 ? g_t * row.beta : 0.0;
  const double radial = context.normalize_input ? 0.0 : row.margin.psi;
  for (int64_t k = 0; k < features; ++k) {
    const double unit_x = row.inverse_x * x(i, k);
    double value = gradient[k] - along * unit_x;
    if (target_factor != 0.0) {
      const double tangent = row.angle.tangent(unit_x, row.inverse_w * w(row.target, k));
      value += target_factor * (radial * unit_x - row.margin.dtheta * tangent);
    }
    products[k] = static_cast<T>(outer * value);
  }
}

} // namespace

void finish_classes(const FinishClassesArgs& args, c10::ScalarType acc) {
  const auto finish_range = [&](auto& finisher, int64_t begin, int64_t end) {
    const int64_t* const targets = args.sorted_target;
    const int64_t* next = std::lower_bound(targets, targets + args.rows, args.first_class + begin);
    for (int64_t j = begin; j < end; ++j) {
      const int64_t* const first = next;
      while (next != targets + args.rows && *next == args.first_class + j) {
        ++next;
      }
      finisher.finish(j, args.sorted_row + (first - targets), args.sorted_row + (next - targets));
    }
  };
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, args.context.input.dtype, "torchmargin_finish_classes", [&] {
          at::parallel_for(0, args.class_count, grain(args.context.features), [&](int64_t begin, int64_t end) {
            ClassFinisher<scalar_t, T> finisher(args);
            finish_range(finisher, begin, end);
          });
        });
  });
}

void finish_rows(const FinishRowsArgs& args, c10::ScalarType acc) {
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, args.context.input.dtype, "torchmargin_finish_rows", [&] {
      at::parallel_for(0, args.rows, grain(args.context.features * 8), [&](int64_t begin, int64_t end) {
        std::vector<double> gradient(args.context.features);
        for (int64_t i = begin; i < end; ++i) {
          finish_row<scalar_t, T>(args, i, gradient);
        }
      });
    });
  });
}

} // namespace torchmargin::cpu
