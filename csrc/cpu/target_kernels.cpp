// The targets before the sweep and the end of the forward pass. Rows that are contiguous in acc go through the row
// kernels; any others through the bodies that all devices share.
#include <vector>

#include "cpu/contiguous_rows.h"
#include "cpu/loops.h"
#include "cpu/range_kernels.h"
#include "cpu/row_kernels.h"
#include "math/team.h"
#include "sweep/combine_rows.h"
#include "sweep/hard_rows.h"
#include "sweep/merge_hardest.h"
#include "sweep/target_rows.h"

namespace torchmargin::cpu {
namespace {

// measure_against() by the row kernels.
template <typename T>
RowState measure_contiguous(const TargetContext& context, int64_t row, RowState state, int64_t center) {
  const RowKernels<T>& kernels = row_kernels<T>();
  const T* const w = contiguous_row<T>(context.weight, center);
  state.w_squared = kernels.squared_norm(w, context.features);
  const double inverse_x = inverse_norm(state.x_squared);
  const double inverse_w = inverse_norm(state.w_squared);
  if (inverse_x != 0.0 && inverse_w != 0.0) {
    kernels.distances(
        contiguous_row<T>(context.input, row), w, context.features, inverse_x, inverse_w, &state.delta_squared,
        &state.sigma_squared);
  }
  return state;
}

// measure_row() by the row kernels.
template <typename T>
RowState measure_contiguous_row(const TargetContext& context, int64_t row) {
  const int64_t target = context.target[row];
  RowState state{};
  state.x_squared = row_kernels<T>().squared_norm(contiguous_row<T>(context.input, row), context.features);
  if (target < 0 || target >= context.classes) {
    return state;
  }
  return nearest_center(
      context, target, [&](int64_t center) { return measure_contiguous<T>(context, row, state, center); });
}

// The sum of A_i . B_j over the other classes. `scratch`: [D].
template <typename T>
double sum_contiguous_row(const CombineRowsArgs& args, int64_t i, double* scratch) {
  const TargetContext& context = args.context;
  const TargetRow row = evaluate_target(context, i, args.state[i]);
  const double* others = args.weight_sum;
  if (row.present) {
    subtract_own_weight<T>(args.weight_sum, context.weight, row.target, row.b, context.features, scratch);
    others = scratch;
  }
  return row.a * row_kernels<T>().dot(others, contiguous_row<T>(context.input, i), context.features);
}

} // namespace

void target_rows_range(const TargetRowsArgs& args, c10::ScalarType acc, int64_t begin, int64_t end) {
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    if (!args.measured && has_contiguous_rows<T>(args.context)) {
      for (int64_t i = begin; i < end; ++i) {
        finish_target_row<T>(args, i, measure_contiguous_row<T>(args.context, i));
      }
      return;
    }
    with_dtype(args.context.input.dtype, [&](auto scalar) {
      for (int64_t i = begin; i < end; ++i) {
        target_row<decltype(scalar), T>(args, i, Alone());
      }
    });
  });
}

void hard_rows_range(const HardRowsArgs& args, c10::ScalarType /*acc*/, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    args.hard[i] = hard_row(args, i);
  }
}

void merge_hardest_range(const MergeHardestArgs& args, c10::ScalarType acc, int64_t begin, int64_t end) {
  const TargetContext& context = args.context;
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    if (has_contiguous_rows<T>(context)) {
      for (int64_t i = begin; i < end; ++i) {
        RowState of_row{};
        of_row.x_squared = args.state[i].x_squared;
        merge_hardest_lists<T>(args, i, Alone(), [&](int64_t class_index) {
          return logit_of_state(context, nearest_center(context, class_index, [&](int64_t center) {
                                  return measure_contiguous<T>(context, i, of_row, center);
                                }));
        });
      }
      return;
    }
    with_dtype(context.input.dtype, [&](auto scalar) {
      for (int64_t i = begin; i < end; ++i) {
        merge_hardest_row<decltype(scalar), T>(args, i, Alone());
      }
    });
  });
}

void combine_rows_range(const CombineRowsArgs& args, c10::ScalarType acc, int64_t begin, int64_t end) {
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    if (args.weight_sum != nullptr && has_contiguous_rows<T>(args.context)) {
      std::vector<double> scratch(args.context.features);
      for (int64_t i = begin; i < end; ++i) {
        finish_combined_row<T>(args, i, sum_contiguous_row<T>(args, i, scratch.data()));
      }
      return;
    }
    with_dtype(args.context.input.dtype, [&](auto scalar) {
      for (int64_t i = begin; i < end; ++i) {
        combine_row<decltype(scalar), T>(args, i, Alone());
      }
    });
  });
}

} // namespace torchmargin::cpu
