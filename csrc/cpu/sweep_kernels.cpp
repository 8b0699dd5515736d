// The kernels of the seam on the CPU: loops over rows or classes in parallel, each row
// by the row kernels of the running instruction set. No row is shared between threads
// and every sum has a fixed order, so results do not depend on the number of threads
// (the products' own may).
#include "cpu/sweep_kernels.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/row_kernels.h"
#include "cpu/target_row.h"
#include "math/online_lse.h"

namespace torchmargin::cpu {
namespace {

// Calls body(T()) with T = double or float.
template <typename Body>
void with_acc(c10::ScalarType acc, Body body) {
  acc == c10::ScalarType::Double ? body(double()) : body(float());
}

// Rows per task, so that a task has some ten thousand elements.
int64_t grain(int64_t row_size) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(row_size, 1));
}

void load_rows(const LoadRowsArgs& args, c10::ScalarType acc) {
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    const RowKernels<T>& kernels = row_kernels<T>();
    T* const rows = static_cast<T*>(args.rows);
    T* const inverse_norms = static_cast<T*>(args.inverse_norms);
    const double operand_scale = args.operand_scale != nullptr ? *args.operand_scale : 1.0;
    if (args.inverse_norms != nullptr || args.scale_in_place) {
      at::parallel_for(0, args.row_count, grain(args.features), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          T* const row = rows + i * args.row_stride;
          double factor = args.normalize ? inverse_norm(kernels.squared_norm(row, args.features)) : 1.0;
          if (inverse_norms != nullptr) {
            inverse_norms[i] = static_cast<T>(factor);
          }
          if (!args.scale_in_place) {
            continue;
          }
          const double given = args.row_factor != nullptr ? args.row_factor[i] * operand_scale : 1.0;
          // NB: a row without a gradient is 0 even if it holds NaN; one with next to none
          // would make the products denormal, and those are slow.
          if (given == 0.0 || (args.operand_scale != nullptr && std::fabs(given) < 0x1p-90)) {
            std::fill(row, row + args.features, T(0));
          } else if (factor * given != 1.0) {
            kernels.scale_row(row, args.features, factor * given);
          }
        }
      });
    }
    if (args.sum == nullptr) {
      return;
    }
    // Threads share out the features: the order of the sum stays that of the rows.
    const T* const weights = args.scale_in_place || !args.normalize ? nullptr : inverse_norms;
    at::parallel_for(0, args.features, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < args.row_count; ++i) {
        const double factor = weights != nullptr ? static_cast<double>(weights[i]) : 1.0;
        kernels.add_row(args.sum + begin, rows + i * args.row_stride + begin, end - begin, factor);
      }
    });
  });
}

template <typename T>
LogitMap<T> logit_map(const LogitsTile& tile, int64_t first) {
  const T* const norms = static_cast<const T*>(tile.inverse_norms);
  const T* const bias = static_cast<const T*>(tile.bias);
  return {
      static_cast<T>(tile.scale), norms != nullptr ? norms + first : nullptr, bias != nullptr ? bias + first : nullptr};
}

// The target's column within the tile; class_count if it is not there.
int64_t target_column(const LogitsTile& tile, int64_t row) {
  const int64_t column = tile.target[row] - tile.first_class;
  return column >= 0 && column < tile.class_count ? column : tile.class_count;
}

void accumulate_chunk(const AccumulateChunkArgs& args, c10::ScalarType acc) {
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    const LogitsTile& tile = args.tile;
    const RowKernels<T>& kernels = row_kernels<T>();
    at::parallel_for(0, tile.row_count, grain(tile.class_count), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* const dots = static_cast<const T*>(tile.logits) + i * tile.row_stride;
        OnlineLse total{args.shift[i], args.sum[i]};
        double maximum = args.maximum[i];
        const auto add = [&](int64_t first, int64_t last) {
          for (; first < last; first += kBlock) {
            const BlockSum block = kernels.sum_block(
                dots + first, std::min(kBlock, last - first), logit_map<T>(tile, first), args.bounded);
            total.combine({block.shift, block.sum});
            maximum = std::max(maximum, block.maximum);
          }
        };
        const int64_t column = target_column(tile, i);
        add(0, column);
        add(column + 1, tile.class_count);
        args.shift[i] = total.shift;
        args.sum[i] = total.sum;
        args.maximum[i] = maximum;
      }
    });
  });
}

void softmax_chunk(const SoftmaxChunkArgs& args, c10::ScalarType acc) {
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    const LogitsTile& tile = args.tile;
    const RowKernels<T>& kernels = row_kernels<T>();
    at::parallel_for(0, tile.row_count, grain(tile.class_count), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* const out = static_cast<T*>(args.out) + i * tile.class_count;
        if (args.upstream[i] == 0.0) {
          std::fill(out, out + tile.class_count, T(0));
          continue;
        }
        kernels.softmax_row(
            static_cast<const T*>(tile.logits) + i * tile.row_stride, out, tile.class_count, logit_map<T>(tile, 0),
            static_cast<const T*>(args.other_lse)[i], args.times_inverse_norms && tile.inverse_norms != nullptr);
        const int64_t column = target_column(tile, i);
        if (column < tile.class_count) {
          out[column] = T(0);
        }
      }
    });
  });
}

template <typename Scalar, typename T>
void target_pass_rows(const TargetPassArgs& args, int64_t begin, int64_t end) {
  const TargetContext& context = args.context;
  const Reader<Scalar> x(context.input);
  const Reader<Scalar> w(context.weight);
  for (int64_t i = begin; i < end; ++i) {
    const TargetRow row = evaluate_target<Scalar>(context, i);
    const double bias = row.present ? vector_element(context.bias, row.target, 0.0) : 0.0;
    const double target_logit = row.present ? context.margin.scale * row.alpha * row.beta * row.margin.psi + bias : 0.0;
    double logit_sum = 0.0;
    if (args.weight_sum != nullptr) {
      for (int64_t k = 0; k < context.features; ++k) {
        const double others = args.weight_sum[k] - (row.present ? row.b * w(row.target, k) : 0.0);
        logit_sum += row.a * x(i, k) * others;
      }
      logit_sum =
          context.margin.scale * logit_sum + (args.bias_sum != nullptr ? *args.bias_sum - bias : 0.0) + target_logit;
    }
    OnlineLse total;
    double maximum = -std::numeric_limits<double>::infinity();
    for (int64_t partial = i; partial < args.lanes * args.rows; partial += args.rows) {
      total.combine({args.shift[partial], args.sum[partial]});
      maximum = std::max(maximum, args.maximum[partial]);
    }
    const double other_lse = total.project();
    static_cast<T*>(args.other_lse)[i] = static_cast<T>(other_lse);
    static_cast<T*>(args.target_logit)[i] = static_cast<T>(target_logit);
    static_cast<T*>(args.logit_sum)[i] = static_cast<T>(logit_sum);
    static_cast<T*>(args.target_angle)[i] = static_cast<T>(row.present ? row.angle.theta : 0.0);
    // The maximum passed NaN over; the sum did not.
    static_cast<T*>(args.max_other_logit)[i] = static_cast<T>(std::isnan(other_lse) ? other_lse : maximum);
  }
}

void target_pass(const TargetPassArgs& args, c10::ScalarType acc) {
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, args.context.input.dtype, "torchmargin_target_pass", [&] {
      at::parallel_for(0, args.rows, grain(args.context.features * 4), [&](int64_t begin, int64_t end) {
        target_pass_rows<scalar_t, T>(args, begin, end);
      });
    });
  });
}

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

void run_lanes(int64_t lanes, const std::function<void(int64_t)>& body) {
  if (lanes == 1) { // the products and kernels inside share out the threads
    body(0);
    return;
  }
  at::parallel_for(0, lanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t lane = begin; lane < end; ++lane) {
      body(lane);
    }
  });
}

// Fresh memory costs a page fault per 4 KiB, which for a large gradient takes as long as
// the product that fills it; 2 MiB pages make that negligible.
void prepare_buffer(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (data != nullptr && end > begin) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE); // a refusal changes nothing
  }
#endif
}

} // namespace

const SweepKernels& sweep_kernels() {
  static constexpr SweepKernels kernels{load_rows,      accumulate_chunk, softmax_chunk, target_pass,
                                        finish_classes, finish_rows,      run_lanes,     prepare_buffer};
  return kernels;
}

} // namespace torchmargin::cpu
